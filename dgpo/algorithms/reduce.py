"""From per-token values to one loss. The denominator is explicit, and nothing to reduce gives 0 with zero gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def masked_mean(
    values: torch.Tensor, mask: torch.Tensor, *, denominator: torch.Tensor | float | None = None
) -> torch.Tensor:
    """sum(values * mask) / denominator, a scalar.

    Args:
        values: any shape.
        mask: the same shape, 1 where a value counts. Values elsewhere may be NaN or infinite.
        denominator: None for the number of ones in the mask; micro-batches pass that of the whole batch.

    Raises:
        ValueError: the shapes differ.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values are {tuple(values.shape)} but the mask is {tuple(mask.shape)}: expected one shape")
    kept = values.masked_fill(mask == 0, 0.0).sum()
    return divide(kept, mask.count_nonzero() if denominator is None else denominator)


def chunked_mean(
    row_values: Callable[..., torch.Tensor],
    *rows: torch.Tensor,
    denominator: torch.Tensor | float,
    chunk_size: int,
) -> torch.Tensor:
    """sum(row_values(*rows)) / denominator, a scalar, from `chunk_size` rows at a time.

    What a chunk computes on the way is dropped after it and computed again in the backward pass: of row-by-vocabulary
    size, only the inputs and their gradient outlive a chunk.

    Args:
        row_values: maps chunks of the `rows` [n, ..] to the values of those rows, [n]; pure.
        rows: tensors of equal length.
        denominator: what the sum over all rows is divided by: often the tokens of more rows than these.
        chunk_size: at least 1.
    """
    total = rows[0].new_zeros((), dtype=torch.float32)
    # One `split` instead of a slice per chunk: autograd joins its gradients once, a slice's is as large as the whole.
    for chunk in zip(*(tensor.split(chunk_size) for tensor in rows), strict=True):
        total = total + checkpoint(row_values, *chunk, use_reentrant=False).sum()
    return divide(total, denominator)


def divide(total: torch.Tensor, denominator: torch.Tensor | float) -> torch.Tensor:
    """total / denominator, and 0 / 0 = 0."""
    denominator = torch.as_tensor(denominator, device=total.device)
    return total / denominator.masked_fill((denominator == 0) & (total == 0), 1)
