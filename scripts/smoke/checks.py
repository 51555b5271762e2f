"""What a step of scripts/gpu_smoke.py reports: checks that pass or fail, and numbers to read."""

from __future__ import annotations

from typing import Any

import torch


class SkipStep(Exception):
    """The step cannot run here; the message says why."""


class Checks:
    """Rows of {what, value, wanted, ok}, and numbers by name."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.numbers: dict[str, Any] = {}

    def below(self, what: str, value: float, limit: float) -> None:
        """`value` must be below `limit`; what is not finite is not."""
        self._add(what, float(value), f"< {limit:g}", float(value) < limit)

    def within(self, what: str, value: float, expected: float, share: float) -> None:
        """`value` must be `expected`, give or take a share of it."""
        wanted = f"{expected:.4g} within {share:.0%}"
        self._add(what, float(value), wanted, abs(value - expected) <= share * abs(expected))

    def true(self, what: str, value: Any, seen: Any = None) -> None:
        self._add(what, str(seen) if seen is not None else bool(value), "true", bool(value))

    def number(self, name: str, value: float | str) -> None:
        self.numbers[name] = float(f"{value:.4g}") if isinstance(value, float) else value

    def _add(self, what: str, value: Any, wanted: str, ok: bool) -> None:
        self.rows.append({"what": what, "value": value, "wanted": wanted, "ok": ok})
        print(f"{'ok  ' if ok else 'FAIL'} {what}: {value} (wanted {wanted})", flush=True)

    @property
    def all_right(self) -> bool:
        return bool(self.rows) and all(row["ok"] for row in self.rows)

    @property
    def first_wrong(self) -> str | None:
        wrong = [row for row in self.rows if not row["ok"]]
        return f"{wrong[0]['what']}: {wrong[0]['value']}, wanted {wrong[0]['wanted']}" if wrong else None


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|, in float64 on the CPU."""
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((value - reference).norm() / reference.norm())
