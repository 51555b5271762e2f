"""The one masked reduction. The denominator is explicit, and an empty mask gives 0 with zero gradient."""

from __future__ import annotations

import torch


def masked_mean(
    values: torch.Tensor, mask: torch.Tensor, *, denominator: torch.Tensor | float | None = None
) -> torch.Tensor:
    """sum(values * mask) / denominator, a scalar.

    Args:
        values: any shape.
        mask: the same shape, 1 where a value counts. Masked values may be NaN or infinite.
        denominator: None for the number of ones in the mask.
    """
    mask = mask.bool()
    total = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()
    count = mask.sum() if denominator is None else torch.as_tensor(denominator, device=values.device)
    return total / count.clamp(min=1) if denominator is None else total / count
