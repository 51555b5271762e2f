"""What our workers add to veRL's updates: skipped ones are counted, and a resumed run has its own learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def num_skipped(grad_norms: float | Sequence[float]) -> float:
    """Mini-batches that veRL's engine stepped over: those whose gradient norm is not finite.

    Args:
        grad_norms: of each mini-batch of the step; veRL gives one number where there is one.
    """
    norms = grad_norms if isinstance(grad_norms, Sequence) else [grad_norms]
    return float(sum(not math.isfinite(norm) for norm in norms))


def set_learning_rate(optimizer: Optimizer, scheduler: LambdaLR, learning_rate: float) -> None:
    """Puts the configured rate in place of the one in a checkpoint, at the schedule's present step.

    A loaded scheduler otherwise goes on with the rate that the checkpoint was made with, whatever its run says now.
    """
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    scheduler._last_lr = [learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate
