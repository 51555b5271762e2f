"""The watched trainer with a clock on every part of a step; `train.timeline=true` writes down when each part was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.utils.debug import marked_timer

from dgpo.rl.timeline import FILE, TRAINER, PhaseTimes, write_spans
from dgpo.rl.watched_trainer import WatchedTrainer


class TimedTrainer(WatchedTrainer):
    """Adds `timing_s/prepare` (questions to the agent-loop workers) and `timing_s/balance` to veRL's own times."""

    metrics_path: Path
    _phases: PhaseTimes
    episode_spans: dict[str, list[list[Any]]]  # episode -> (name, start, end) of the step in progress

    # veRL begins every step with a new dict, to which it adds the seconds of each phase.
    timing_raw = property(lambda self: self._phases, lambda self, value: setattr(self, "_phases", PhaseTimes()))

    def prepare_step(self) -> dict[str, Any]:
        with marked_timer("prepare", self.timing_raw):
            return super().prepare_step()

    def _balance_batch(self, batch: Any, metrics: dict, **kwargs: Any) -> Any:
        with marked_timer("balance", self.timing_raw):
            return super()._balance_batch(batch, metrics, **kwargs)

    def _write_timeline(self) -> None:
        spans = {TRAINER: self.timing_raw.spans, **self.episode_spans}
        write_spans(self.metrics_path.with_name(FILE), self.global_steps, spans)
