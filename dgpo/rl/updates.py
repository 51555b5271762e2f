"""What we add to veRL's updates: balance over ranks, a count of skipped ones, a resumed run's own learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions


def balanced_over_ranks(lengths: Sequence[int], *, num_ranks: int, mini_batch_size: int) -> list[list[int]]:
    """Each rank's episodes: as many of every update as the others have, with about as much work.

    veRL balances the whole batch, and which episodes share an update then depends on the number of ranks. Here it
    depends on their places alone: a run is the same on any number of ranks, and no rank waits within an update.

    Args:
        lengths: tokens of each episode, in the order in which they are cut into mini-batches.
        mini_batch_size: episodes of an update, over all ranks; a multiple of `num_ranks`.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for first in range(0, len(lengths), mini_batch_size):
        work = [calculate_workload(length) for length in lengths[first : first + mini_batch_size]]
        for share, part in zip(shares, get_seqlen_balanced_partitions(work, num_ranks, equal_size=True), strict=True):
            share.extend(first + index for index in part)
    return shares


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
