"""DistiLLM's adaptive use of student-generated output: when to generate, and what to train on (arXiv 2402.03898)."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dgpo.coldstart.examples import TrainingExample

Source = Literal["teacher", "fresh", "replay"]


@dataclass(frozen=True)
class AdaptiveSchedule:
    """The share of steps that train on the student's own episodes, raised while the held-out loss rises.

    As in the authors' release (jongwooko/distillm, finetune.py) and in TAID's library (SakanaAI/TAID, src/sampler.py),
    which the paper follows; with `level_follows_down` except for `level`. In both it starts at the held-out loss before
    training and only ever rises. Ko et al. start from a fine-tuned student; one that starts untrained has a loss that
    no later one reaches, and then the threshold never moves.

    Attributes:
        threshold: the share, raised by `increment` up to 1.
        level: the held-out loss that the next one is compared with; None before the first.
        increment, min_rise: constants of the run (0.1 in both; `loss_eps`: 0.1 nats in the release, 0 in the library).
        level_follows_down: whether `level` is the lowest loss since the last rise.
    """

    threshold: float
    increment: float
    min_rise: float
    level: float | None = None
    level_follows_down: bool = True

    def observe(self, held_out_loss: float) -> AdaptiveSchedule:
        """The schedule after an evaluation: a rise by `min_rise` above `level` raises the threshold."""
        if self.level is None:
            return replace(self, level=held_out_loss)
        if held_out_loss >= self.level + self.min_rise:
            threshold = min(round(self.threshold + self.increment, 9), 1.0)
            return replace(self, threshold=threshold, level=held_out_loss)
        return replace(self, level=min(self.level, held_out_loss)) if self.level_follows_down else self

    def source(self, draw: float, *, step: int, num_steps: int, buffer_full: bool) -> Source:
        """What step `step` (1 for the first) trains on, given a uniform draw from [0, 1).

        - `fresh`: episodes that the student plays now, which also enter the buffer: with probability
          threshold * (1 - step / num_steps), or `threshold` while the buffer is not full;
        - `replay`: a sample of the buffer, otherwise with probability `threshold`;
        - `teacher`: the teacher's episodes.
        """
        if draw < self.threshold * (1 - step / num_steps) or (draw < self.threshold and not buffer_full):
            return "fresh"
        return "replay" if draw < self.threshold else "teacher"


class ReplayBuffer:
    """The newest `capacity` student-generated episodes, for training more than once."""

    def __init__(self, capacity: int):
        self._examples: deque[TrainingExample] = deque(maxlen=capacity)
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def full(self) -> bool:
        return len(self) == self.capacity

    def add(self, examples: Iterable[TrainingExample]) -> None:
        self._examples.extend(examples)

    def sample(self, count: int, rng: random.Random) -> list[TrainingExample]:
        """`count` different episodes, or all if there are fewer."""
        return rng.sample(list(self._examples), min(count, len(self)))

    def state(self) -> list[dict[str, Any]]:
        return [asdict(example) for example in self._examples]

    def load_state(self, state: Iterable[dict[str, Any]]) -> None:
        self._examples.clear()
        self.add(TrainingExample(**fields) for fields in state)
