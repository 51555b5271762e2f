"""The learning rates that are tried for the tiny world's tables (docs/results/tiny-table.md): rows of `reproduce`."""

from __future__ import annotations

from dgpo.evaluation.arms import Arm, Grid

TABLE = "tuning"
TUNED = ("dgpo", "uniform_kl", "no_teacher", "dgpo_grpo", "kd_gkd")
RATES = ("3e-4", "1e-3", "3e-3")


def rate(arm: str, value: str) -> str:
    """The override that gives any arm one of `RATES`."""
    return f"train.actor_learning_rate={value}"


GRID = Grid({row: Arm(row, row) for row in TUNED}, {value: value for value in RATES}, rate)
ARMS = GRID.tried()
ROWS = {TABLE: tuple(ARMS)}
