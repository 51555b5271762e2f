"""Where alarms go: `alarms.jsonl` in the stage's folder, and one line each on the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dgpo.files import append_jsonl
from dgpo.runs.stability import Alarm

ALARMS = "alarms.jsonl"


def report_alarms(alarms: Sequence[Alarm], folder: Path) -> bool:
    """Writes and prints the alarms. Returns whether they are the first of the run in this folder."""
    path = folder / ALARMS
    first_of_run = not path.exists()
    append_jsonl(path, [{**asdict(alarm), "advice": alarm.advice} for alarm in alarms])
    for alarm in alarms:
        print(f"ALARM {alarm}", flush=True)
    return first_of_run
