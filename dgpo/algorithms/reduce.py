"""From per-token values to one loss. The denominator is explicit, and nothing to reduce gives 0 with zero gradient."""

from __future__ import annotations

import torch


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


def divide(total: torch.Tensor, denominator: torch.Tensor | float) -> torch.Tensor:
    """total / denominator, and 0 / 0 = 0."""
    denominator = torch.as_tensor(denominator, device=total.device)
    return total / denominator.masked_fill((denominator == 0) & (total == 0), 1)
