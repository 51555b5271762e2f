"""What a run of RL says on its terminal, a line per step and alarms; all else that its processes print is in a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LOG = "log.txt"  # in the stage's folder
STEP = "step "
SHOWN = (STEP, "ALARM ")  # how lines begin that the terminal shows


def step_line(record: Mapping[str, Any], *, num_steps: int, step_s: float) -> str:
    """One step: exact match, KL to the teacher (nats per token, where it was measured), seconds, and time left.

    Args:
        record: the step's metrics, and its number.
        num_steps: of the whole run.
        step_s: the mean of the steps so far.
    """
    step = int(record["step"])
    parts = [f"{STEP}{step}/{num_steps}", f"EM {record['episode/em']:.3f}"]
    if (kl := record.get("teacher/kl_all")) is not None:
        parts.append(f"KL {kl:.3f}")
    if (validated := record.get("validation/em")) is not None:
        parts.append(f"validation EM {validated:.3f}")
    left = step_s * (num_steps - step)
    parts.append(f"{record['timing_s/step']:.1f} s")
    parts.append("done" if step >= num_steps else f"{_duration(left)} left")
    return "   ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def divert(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """A handler of what Ray's workers print: into the file, and lines that begin as `SHOWN` to the terminal too."""

    def handle(batch: Mapping[str, Any]) -> None:
        speaker = f"({batch.get('actor_name') or batch.get('task_name') or 'ray'} {batch.get('pid')}) "
        lines = list(batch.get("lines", ()))
        with path.open("a", errors="replace") as file:
            file.writelines(f"{speaker}{line}\n" for line in lines)
        for line in lines:
            if line.startswith(SHOWN):
                print(line, flush=True)

    return handle
