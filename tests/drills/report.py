"""What the drills found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What came of one drill.

    Attributes:
        seconds: from the fault until the run worked again, or had ended with all its processes.
        message: what the user is told, or what the seconds are made of.
        lost: steps, episodes or records.
    """

    fault: str
    what: str
    seconds: float
    message: str
    lost: str = ""


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, one line per drill."""
    rows = [(o.fault, o.what, f"{o.seconds:.1f} s", o.lost, o.message.replace("|", "/")) for o in outcomes]
    head = ("fault", "what happened", "time to recover or stop", "lost", "told")
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
