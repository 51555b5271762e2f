"""ARCap in the report: a radar of what each model can do, and a table beside the paper's.

Read from `arcap/arcap.json` of a run folder, written by the ARCap stage:

    {"models": {NAME: {
        "checkpoint": str,
        "source_referencing": {SET: {"em", "em_ci95": [low, high], "num_questions"}},   gold passages, answer at once
        "using_evidence":     {SET: {"em", "em_ci95", "num_questions"}},                gold passages, may think
        "query_rewriting":    {SET: {"hit", "hit_ci95", "num_questions"}},              first query, top-3 passages
        "when_to_search":     {SET: {"hit", "hit_ci95", "num_searches", "num_questions"}},      full episodes
    }}}

Every dimension may be absent or lack sets. `em` and `hit` are shares from 0 to 1; `num_searches` is a mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dgpo.evaluation.charts import radar_chart
from dgpo.evaluation.paper import paper_arcap, protocol_note

ARCAP_FILE = "arcap/arcap.json"
# Dimension -> its metric, and the label of its axes.
DIMENSIONS = {
    "source_referencing": ("em", "source referencing"),
    "using_evidence": ("em", "using evidence"),
    "query_rewriting": ("hit", "query rewriting"),
    "when_to_search": ("hit", "when to search"),
}

_PAPER = " Behind the stroke, <span class='paper'>the paper's</span> where it prints one."


def read_arcap(folder: Path) -> dict[str, Any] | None:
    """`arcap.json` of a run folder; None where ARCap was not measured."""
    path = folder / ARCAP_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def arcap_section(arcap: Mapping[str, Any], *, pair: str | None) -> str:
    """The section of the page.

    Args:
        arcap: as described above.
        pair: the paper's pair of teacher and student that these models are, for its numbers; None for others.
    """
    models = arcap["models"]
    axes = [
        (dimension, name)
        for dimension in DIMENSIONS
        for name in dict.fromkeys(name for model in models.values() for name in model.get(dimension, {}))
    ]
    labels = [f"{DIMENSIONS[dimension][1]}, {name}" for dimension, name in axes]
    shapes = {model: [_value(values, *axis) for axis in axes] for model, values in models.items()}
    radar = radar_chart(labels, shapes, title="Capabilities (shares)") if len(axes) >= 3 else ""
    paper = ""
    if pair:
        paper = f"{_PAPER} {escape(protocol_note({arcap['temperature']}, upstream=arcap['hits'] != 'ours'))}"
    return (
        '<section id="arcap"><h2>What the agent can do (ARCap)</h2><p><i>source referencing</i>: gold passages given, '
        "the answer at once (EM). <i>using evidence</i>: the same passages, but it may think and search (EM). <i>query "
        "rewriting</i>: a gold answer stands in what the first query finds. <i>when to search</i>: it stands in "
        f"anything that the whole episode found.{paper}</p>"
        f'<div class="arcap">{radar}{_table(models, axes, labels, pair)}</div></section>'
    )


def _value(model: Mapping[str, Any], dimension: str, name: str) -> float | None:
    measured = model.get(dimension, {}).get(name)
    return None if measured is None else measured[DIMENSIONS[dimension][0]]


def _table(models: Mapping[str, Any], axes: Sequence[tuple[str, str]], labels: Sequence[str], pair: str | None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in models)
    rows = []
    for (dimension, name), label in zip(axes, labels, strict=True):
        cells = "".join(f"<td>{_cell(model, row, dimension, name, pair)}</td>" for row, model in models.items())
        rows.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    for name in dict.fromkeys(name for dimension, name in axes if dimension == "when_to_search"):
        cells = "".join(f"<td>{_searches(model, name)}</td>" for model in models.values())
        rows.append(f"<tr><td>searches per episode, {escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(model: Mapping[str, Any], row: str, dimension: str, name: str, pair: str | None) -> str:
    measured = model.get(dimension, {}).get(name)
    if measured is None:
        return ""
    metric = DIMENSIONS[dimension][0]
    low, high = measured[f"{metric}_ci95"]
    paper = paper_arcap(pair, row, dimension, name) if pair else None
    beside = "" if paper is None else f' <small>/</small> <small class="paper">{paper:.3f}</small>'
    return f'{measured[metric]:.3f}{beside}<small class="under">[{low:.2f}, {high:.2f}]</small>'


def _searches(model: Mapping[str, Any], name: str) -> str:
    measured = model.get("when_to_search", {}).get(name)
    return "" if measured is None else f"{measured['num_searches']:.2f}"
