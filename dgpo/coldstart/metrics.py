"""What a distillation tells while it runs: metrics.jsonl, and lines on the console."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dgpo.engines.episode_runner import REPORT_EVERY_S
from dgpo.files import append_jsonl, drop_records_after


class StepClock:
    """Time and tokens of the training steps since the last reading; evaluation and saving do not count."""

    def __init__(self) -> None:
        self._num_steps, self._seconds, self._tokens, self._started = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, num_tokens: float) -> None:
        self.add(time.perf_counter() - self._started, num_tokens)

    def add(self, seconds: float, num_tokens: float) -> None:
        self._seconds += seconds
        self._tokens += num_tokens
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Seconds per step, and tokens of prompts and responses per second over all ranks; starts anew."""
        seconds, tokens, steps = max(self._seconds, 1e-9), self._tokens, max(self._num_steps, 1)
        self._num_steps, self._seconds, self._tokens = 0, 0.0, 0.0
        return {"step_s": seconds / steps, "tokens_per_s": tokens / seconds}


class MetricsFile(TrainerCallback):
    """Appends losses and speed to a jsonl file, and prints a line every `REPORT_EVERY_S`, on the first rank.

    Speed and time left on a line are of all steps since the one before.
    """

    def __init__(self, path: Path, *, name: str, num_steps: int, steps_per_epoch: int):
        self.path, self.name, self.num_steps, self.steps_per_epoch = path, name, num_steps, steps_per_epoch
        self._printed_s, self._clock = time.monotonic(), StepClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that continues keeps the lines up to its checkpoint: it will write the later ones again."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_records_after(self.path, state.global_step or -1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "held_out_loss"} & logs.keys():
            return
        step = state.global_step
        line = {"step": step, **logs, "epoch": round(step / self.steps_per_epoch, 4)}
        append_jsonl(self.path, [line])
        if "held_out_loss" in logs:
            print(f"{self.name}: step {step}/{self.num_steps} held-out loss {logs['held_out_loss']:.3f}", flush=True)
            return
        self._clock.add(logs["step_s"], logs["step_s"] * logs["tokens_per_s"])
        if step == self.num_steps or time.monotonic() - self._printed_s >= REPORT_EVERY_S:
            self._printed_s, speed = time.monotonic(), self._clock.read()
            left = timedelta(seconds=round((self.num_steps - step) * speed["step_s"]))
            print(
                f"{self.name}: step {step}/{self.num_steps} loss {logs['loss']:.3f}, "
                f"{speed['tokens_per_s']:,.0f} tokens/s, {left} left",
                flush=True,
            )
