"""What the tables of tuning seeds end with: every value that was tried, the best for each arm, and what to run next."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from dgpo.evaluation import gate, rates
from dgpo.evaluation.arms import Grid
from dgpo.evaluation.paper import LABELS
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.pipeline.over_seeds import Values

GRIDS = {rates.TABLE: rates.GRID, "gate_tuning": gate.GRID}


def write_tuning(folder: Path, table: str, seeds: Sequence[int], overrides: Sequence[str]) -> Path:
    """Writes `table_<table>_seeds.md` and `.json` from the runs of every seed, and prints the table.

    Args:
        overrides: of the command that ran.
    """
    grid = GRIDS[table]
    values = {row: {seed: _last_score(folder, seed, row) for seed in seeds} for row in grid.tried()}
    best = grid.best(values)
    chosen = {arm: grid.override(arm, value) for arm, value in best.items()}
    following = gate_command(overrides, chosen) if table == "gate_tuning" else " ".join(_rows(chosen))
    text = f"{render(grid, values, chosen)}\nNext:\n\n    {following}\n"
    path = folder / f"table_{table}_seeds"
    record = {"seeds": list(seeds), "values": values, "best": best}
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    atomic_write_text(path.with_suffix(".md"), text)
    print(text)
    return path.with_suffix(".md")


def gate_command(overrides: Sequence[str], chosen: Mapping[str, str]) -> str:
    """The line that makes `table=gate` with the chosen coefficients and whatever else the tuning was given."""
    kept = [each for each in overrides if not each.startswith(("table=", "seeds=", "seed=", "rows."))]
    seeds = shlex.quote(f"seeds=[{','.join(map(str, gate.TEST_SEEDS))}]")
    return " ".join(["python -m dgpo reproduce table=gate", shlex.join(kept), seeds, *_rows(chosen)])


def render(grid: Grid, values: Values, chosen: Mapping[str, str]) -> str:
    lines = [f"| arm | {' | '.join(grid.values.values())} | best |", f"|---{'|---' * len(grid.values)}|---|"]
    for name, arm in grid.arms.items():
        tried = [values[f"{name}_{value}"].values() for value in grid.values]
        cells = [f"{statistics.mean(each):.3f} ({', '.join(f'{em:.3f}' for em in each)})" for each in tried]
        lines.append(f"| {LABELS.get(name, arm.label)} | {' | '.join(cells)} | `{chosen[name]}` |")
    return "Exact match on validation questions at the last step, mean (by seed).\n\n" + "\n".join(lines) + "\n"


def _rows(chosen: Mapping[str, str]) -> list[str]:
    return [shlex.quote(f'rows.{arm}=["{override}"]') for arm, override in chosen.items()]


def _last_score(folder: Path, seed: int, row: str) -> float:
    metrics = read_jsonl(folder / f"seed_{seed}" / "tiny" / row / "train" / "metrics.jsonl")
    return float(metrics[-1]["validation/em"])
