"""Where alarms go: `alarms.jsonl` in the stage's folder, and one line each on the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dgpo.runs.stability import Alarm

ALARMS = "alarms.jsonl"


def report_alarms(alarms: Sequence[Alarm], folder: Path) -> bool:
    """Writes and prints the alarms. Returns whether they are the first of the run in this folder."""
    path = folder / ALARMS
    first_of_run = not path.exists()
    with path.open("a") as file:
        for alarm in alarms:
            file.write(json.dumps({**asdict(alarm), "advice": alarm.advice}) + "\n")
    for alarm in alarms:
        print(f"ALARM {alarm}", flush=True)
    return first_of_run
