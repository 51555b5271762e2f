"""Training curves of one run, or of several runs over each other, and the alarms that were raised."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dgpo.evaluation.charts import line_chart
from dgpo.files import read_jsonl

Record = Mapping[str, Any]

# Title of a chart of RL -> label of a line -> metric.
RL_CHARTS: dict[str, dict[str, str]] = {
    "Exact match during RL": {"training episodes (sampled)": "episode/em"},
    "Share of episodes": {
        "hit": "episode/hit",
        "gated (the teacher term applies)": "teacher/gate_fraction",
        "answered": "episode/answered",
    },
    "Reverse KL to the teacher (nats per token)": {
        "in the loss": "actor/teacher_loss",
        "failed episodes": "teacher/kl_failed",
        "correct episodes": "teacher/kl_correct",
    },
    "Searches per episode": {"searches": "episode/num_searches"},
    "Entropy of the policy (nats per token)": {"entropy": "actor/entropy"},
    "KL to the initial policy (nats per token)": {"KL": "actor/kl_to_init"},
    "Response length (tokens)": {"tokens": "response_length/mean"},
    "Seconds per step": {"whole step": "timing_s/step", "rollouts": "timing_s/gen", "teacher": "timing_s/ref"},
}
_VALIDATION_EM = re.compile(r"val-(?:aux|core)/(.+)/em/mean@\d+")


@dataclass(frozen=True)
class RunCurves:
    """What the training stages of a run logged, step by step."""

    name: str
    training: Sequence[Record]
    distillation: Sequence[Record]
    alarms: Sequence[Record]


def read_curves(folder: Path, name: str) -> RunCurves:
    """The logs that are in a run folder; a stage that did not run leaves an empty one."""
    distilled = next(
        (path for place in ("distill/model", "distill") if (path := folder / place / "metrics.jsonl").exists()), None
    )
    return RunCurves(
        name,
        training=read_jsonl(folder / "train" / "metrics.jsonl", growing=True),
        distillation=read_jsonl(distilled, growing=True) if distilled else [],
        alarms=read_jsonl(folder / "train" / "alarms.jsonl", growing=True),
    )


def curves_section(runs: Sequence[RunCurves]) -> str:
    """The section of the page: with one run the related metrics share a chart, with several each metric has its own."""
    charts = _single(runs[0]) if len(runs) == 1 else _overlaid(runs)
    drawn = "".join(charts)
    if not drawn:
        return ""
    alarms = "".join(_alarm_list(run, several=len(runs) > 1) for run in runs)
    return f'<section id="curves"><h2>Learning curves</h2>{alarms}<div class="charts">{drawn}</div></section>'


def _single(run: RunCurves) -> list[str]:
    marks = _marks(run)
    charts = []
    for title, metrics in RL_CHARTS.items():
        lines = {label: series(run.training, metric) for label, metric in metrics.items()}
        dotted = _validation(run) if "episode/em" in metrics.values() else {}
        charts.append(line_chart(lines, dotted=dotted, marks=marks, x_label="RL step", y_label=title))
    loss = {"loss": series(run.distillation, "loss"), "held-out loss": series(run.distillation, "held_out_loss")}
    charts.insert(1, line_chart(loss, x_label="step", y_label="Cold start"))
    return charts


def _overlaid(runs: Sequence[RunCurves]) -> list[str]:
    charts = []
    for title, metrics in RL_CHARTS.items():
        for label, metric in metrics.items():
            lines = {run.name: series(run.training, metric) for run in runs}
            heading = title if len(metrics) == 1 else f"{title}: {label}"
            charts.append(line_chart(lines, x_label="RL step", y_label=heading))
    for name in sorted({name for run in runs for name in _validation(run)}):
        dotted = {run.name: _validation(run).get(name, []) for run in runs}
        charts.append(line_chart(dotted, dotted=dotted, x_label="RL step", y_label=f"Exact match, {name}"))
    loss = {run.name: series(run.distillation, "loss") for run in runs}
    return [*charts, line_chart(loss, x_label="step", y_label="Cold start: loss")]


def series(records: Sequence[Record], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have the metric."""
    return [(record["step"], record[metric]) for record in records if metric in record]


def _validation(run: RunCurves) -> dict[str, list[tuple[float, float]]]:
    metrics = {key: match[1] for record in run.training for key in record if (match := _VALIDATION_EM.fullmatch(key))}
    return {f"validation: {name}": series(run.training, key) for key, name in sorted(metrics.items())}


def _marks(run: RunCurves) -> dict[str, list[float]]:
    marks: dict[str, list[float]] = {}
    for alarm in run.alarms:
        marks.setdefault(f"{alarm['rule']} ({alarm['metric']})", []).append(alarm["step"])
    return marks


def _alarm_list(run: RunCurves, *, several: bool) -> str:
    if not run.alarms:
        return ""
    items = "".join(
        f"<li><b>{escape(alarm['rule'])}</b> at step {alarm['step']}: {escape(alarm['metric'])} = "
        f"{alarm['value']:.4g}, limit {alarm['threshold']:.4g}, first sign at step {alarm['first_step']}. "
        f"{escape(alarm['advice'])}</li>"
        for alarm in run.alarms
    )
    of_run = f" of {escape(run.name)}" if several else ""
    return f'<div class="alarms"><h3>Alarms{of_run}</h3><ul>{items}</ul></div>'
