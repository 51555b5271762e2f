"""TAID's adaptive interpolation t, as a value that is passed in and returned (Shing et al. 2025, arXiv 2501.16937)."""

from __future__ import annotations

import math
from dataclasses import dataclass

_EPSILON = 1e-15  # keeps the relative change finite, as in the authors' release


@dataclass(frozen=True)
class TaidSchedule:
    """What does not change during a run. The paper's values: 0.4, 1.0, 5e-4, 0.99.

    Attributes:
        t_start: t before the first step: the teacher's share of the target's logits.
        t_end: t is never more.
        alpha: size of the adaptive increments.
        momentum: decay of the running mean of the loss's relative change (the paper's beta).
        num_steps: of the whole training; t rises at least linearly to `t_end` over them.
    """

    t_start: float
    t_end: float
    alpha: float
    momentum: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise ValueError(f"TAID's t goes from {self.t_start} to {self.t_end}: expected 0 <= start <= end <= 1")
        if self.num_steps < 1:
            raise ValueError(f"TAID's schedule has {self.num_steps} steps: expected the number of training steps")


@dataclass(frozen=True)
class TaidState:
    """What a checkpoint must keep: t, and what the next update compares with."""

    t: float
    previous_loss: float | None = None
    mean_change: float = 0.0


def initial_state(schedule: TaidSchedule) -> TaidState:
    return TaidState(t=schedule.t_start)


def update_state(state: TaidState, loss: float, *, step: int, schedule: TaidSchedule) -> TaidState:
    """The state after a step whose TAID loss, over the whole batch, was `loss`.

        change = (previous - loss) / previous
        mean   = momentum * mean + (1 - momentum) * change
        t      = min(t_end, max(linear(step), t + alpha * sigmoid(mean) * (1 - t)))

    so that t rises faster while the loss falls, and never falls behind the straight line from `t_start` to `t_end`.
    With fewer than some thousand steps the line is always ahead of the increments, and t is that line. The first loss
    only sets `previous`.

    Args:
        state: before the step.
        loss: the value that was trained on, in nats per token of the whole batch, equal on all ranks. Ours is the
            paper's KL(q_t || p); the authors' release feeds the cross-entropy in its place, which differs by the
            target's entropy.
        step: number of optimiser steps before this one: 0 for the first.
        schedule: the run's.
    """
    if state.previous_loss is None:
        return TaidState(t=state.t, previous_loss=loss, mean_change=state.mean_change)
    change = (state.previous_loss - loss) / (state.previous_loss + _EPSILON)
    mean_change = schedule.momentum * state.mean_change + (1 - schedule.momentum) * change
    sigmoid = (1 + math.tanh(mean_change / 2)) / 2  # finite for any change: exp(-mean_change) could overflow
    increment = schedule.alpha * sigmoid * (1 - state.t)
    linear = schedule.t_start + (schedule.t_end - schedule.t_start) * step / schedule.num_steps
    t = min(schedule.t_end, max(linear, state.t + increment))
    return TaidState(t=t, previous_loss=loss, mean_change=mean_change)
