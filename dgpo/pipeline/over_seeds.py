"""A table of several seeds: what every row reaches, and the primary contrasts, with the seed as the unit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgpo.evaluation.charts import dot_chart
from dgpo.evaluation.paper import CONTRASTS, EQUIVALENCE_MARGINS, LABELS
from dgpo.files import atomic_write_text
from dgpo.metrics.seeds import contrast, equivalence_p, holm

ALPHA = 0.05

Values = Mapping[str, Mapping[int, float]]  # row -> seed -> exact match


def write_over_seeds(folder: Path, table: str, seeds: Sequence[int]) -> Path:
    """Reads `seed_N/table_<table>.json` of every seed; prints the table, and writes it, its numbers and a chart."""
    last, best = (_read(folder, table, seeds, column) for column in ("last", "best"))
    contrasts = primary_contrasts(last)
    record = {"seeds": list(seeds), "last": last, "best": best, "contrasts": contrasts}
    atomic_write_text(folder / f"table_{table}_seeds.json", json.dumps(record, indent=1) + "\n")
    text = render(last, best, contrasts)
    points = {LABELS[row]: {"last step": list(by_seed.values())} for row, by_seed in last.items()}
    chart = dot_chart(points, x_label="exact match, a point per seed, a bar at the mean")
    atomic_write_text(folder / f"table_{table}_seeds.svg", chart)
    path = folder / f"table_{table}_seeds.md"
    atomic_write_text(path, text)
    print(text)
    return path


def primary_contrasts(values: Values, pairs: Sequence[tuple[str, str]] = CONTRASTS) -> list[dict[str, Any]]:
    """Contrasts between rows that are there, paired by seed; p values adjusted for their number by Holm's method."""
    found: list[dict[str, Any]] = []
    for row, other in pairs:
        seeds = sorted(set(values.get(row, {})) & set(values.get(other, {})))
        if len(seeds) < 2:
            continue
        differences = [values[row][seed] - values[other][seed] for seed in seeds]
        margin = EQUIVALENCE_MARGINS.get((row, other))
        equivalence = {"margin": margin, "p": equivalence_p(differences, margin)} if margin else None
        found.append({"row": row, "other": other, **asdict(contrast(differences)), "equivalence": equivalence})
    for each, adjusted in zip(found, holm([each["p"] for each in found]), strict=True):
        each["p_holm"] = adjusted
    return found


def render(last: Values, best: Values, contrasts: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables. An interval with 0 in it is "not shown", never "does not hold"."""
    lines = [
        "| row | seeds | EM, last step | deviation | least, most | EM, best on validation |",
        "|---|---|---|---|---|---|",
    ]
    for row, by_seed in last.items():
        values, others = list(by_seed.values()), list(best.get(row, {}).values())
        deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        shown = f"{statistics.mean(others):.3f}" if others else "-"
        extremes = f"{min(values):.3f}, {max(values):.3f}"
        lines.append(
            f"| {LABELS[row]} | {len(values)} | {statistics.mean(values):.3f} | {deviation} | {extremes} | {shown} |"
        )
    return "\n".join(lines) + "\n" + render_contrasts(contrasts, LABELS, "last step")


def render_contrasts(contrasts: Sequence[Mapping[str, Any]], labels: Mapping[str, str], of_what: str) -> str:
    """A blank line and a Markdown table; nothing without contrasts."""
    if not contrasts:
        return ""
    lines = ["", f"| contrast, {of_what} | mean | 95% interval | p | p, Holm | |", "|---|---|---|---|---|---|"]
    for each in contrasts:
        low, high = each["interval"]
        verdict = "shown" if each["p_holm"] < ALPHA else "not shown"
        if equivalence := each["equivalence"]:
            is_shown = "shown" if equivalence["p"] < ALPHA else "not shown"
            verdict += f"; within {equivalence['margin']:g}: {is_shown} (p = {equivalence['p']:.3g})"
        name = f"{labels[each['row']]} - {labels[each['other']]}"
        numbers = f"{each['mean']:+.3f} | [{low:+.3f}, {high:+.3f}] | {each['p']:.3g} | {each['p_holm']:.3g}"
        lines.append(f"| {name} | {numbers} | {verdict} |")
    return "\n".join(lines) + "\n"


def _read(folder: Path, table: str, seeds: Sequence[int], column: str) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for seed in seeds:
        for row in json.loads((folder / f"seed_{seed}" / f"table_{table}.json").read_text())["rows"]:
            if row[column]:
                values.setdefault(row["row"], {})[seed] = row[column]["average"]
    return values
