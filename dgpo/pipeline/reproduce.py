"""The paper's tables: plan the stages, run what is missing, and print our numbers beside the paper's.

python -m dgpo reproduce table=main world=tiny hardware=cpu run_dir=runs/tables
python -m dgpo reproduce table=pairs retriever.url=http://node0:8000 data.train_file=... dry_run=true
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgpo.config.load import ConfigError, chosen, group_choices, load_config
from dgpo.config.schema import Config
from dgpo.evaluation.paper import LABELS, MAIN_PAIR, TABLES, paper_value
from dgpo.evaluation.records import read_records
from dgpo.evaluation.scores import Score, compare
from dgpo.files import atomic_write_text
from dgpo.hardware.gpu_hours import gpu_hours_range
from dgpo.pipeline import tiny
from dgpo.pipeline.plan import Plan, plan_table
from dgpo.pipeline.processes import Stages, check_settings, python_module

BASELINE = {"main": "kd", "ablation": "dgpo", "pairs": "kd"}  # the row that the paired differences are against
SETTINGS = "reproduce.json"


def reproduce(overrides: Sequence[str]) -> Path | None:
    """Runs what is missing of a table into `run_dir`; what is complete there stays.

    Returns:
        The table as a Markdown file, or None for a dry run, which prints the plan.

    Raises:
        ConfigError: an override is wrong, or the folder was made with other settings; nothing was started.
        StageFailedError: a stage failed; the same command continues.
    """
    config = load_config(overrides)
    pairs = _pairs(config, overrides)
    folder = Path(config.run_dir)
    own = [o for o in overrides if not o.startswith(("pair=", "run_dir=", "dry_run", "table="))]
    if config.dry_run.assume:
        own = [*(o for o in own if not o.startswith("hardware=")), f"hardware={config.dry_run.assume}"]
    if config.dry_run:
        for pair in pairs:
            inputs = ["student.path=student", "teacher.path=teacher"] if pair == "tiny" else [f"pair={pair}"]
            _print_plan(pair, _plan(pair, folder, config, inputs, own))
        return None
    check_settings(folder / SETTINGS, {"overrides": sorted(own)})  # rows of other settings would not be one table
    stages = Stages(folder)
    plans: dict[str, Plan] = {}
    for pair in pairs:
        with _inputs(pair, stages, folder, config) as inputs:
            plan = plans[pair] = _plan(pair, folder, config, inputs, own)
            _print_plan(pair, plan)
            for stage in plan.stages:
                if not stage.is_done:
                    resume = ["resume=true"] if stage.has_begun else []
                    command = [*python_module("dgpo"), stage.stage, *stage.overrides, *resume]
                    stages.run(**{stage.name: command})
    return _write_table(folder, config.table, plans)


def _plan(pair: str, folder: Path, config: Config, inputs: Sequence[str], own: Sequence[str]) -> Plan:
    student = load_config([*inputs, *own]).student.path or ""
    shared = folder / (pair if pair == "tiny" else Path(student).name)
    return plan_table(config.table, folder / pair, shared, inputs, own)


def _pairs(config: Config, overrides: Sequence[str]) -> list[str]:
    if config.table not in TABLES:
        raise ConfigError(f"table={config.table}: expected one of {', '.join(TABLES)}")
    for name in ("experiment", "train.init", "distill.episodes", "stages"):
        if chosen(name, overrides):
            raise ConfigError(f"{name}=... in `reproduce`: the rows of the table decide that; leave it out")
    if chosen("world", overrides) == "tiny":
        if config.table == "pairs":
            raise ConfigError("table=pairs with world=tiny: the tiny world has one pair; take table=main or ablation")
        return ["tiny"]
    return group_choices("pair") if config.table == "pairs" else [chosen("pair", overrides) or MAIN_PAIR]


@contextlib.contextmanager
def _inputs(pair: str, stages: Stages, folder: Path, config: Config) -> Iterator[list[str]]:
    if pair != "tiny":
        yield [f"pair={pair}"]
        return
    tiny.build_missing(stages, folder / "tiny", seed=config.seed)
    with tiny.served(stages, folder / "tiny") as inputs:
        yield inputs


def _print_plan(pair: str, plan: Plan) -> None:
    table = Table(title=f"Stages for {pair}", title_justify="left")
    for column in ("stage", "starts from", "GPU hours: counted", "as in the paper", ""):
        table.add_column(column, justify="left" if column in ("stage", "starts from", "") else "right")
    totals = [0.0, 0.0]
    for stage in plan.stages:
        config = stage.config
        hours = gpu_hours_range(config, stage.stage)
        totals = [total + (hours or (0.0, 0.0))[i] for i, total in enumerate(totals)]
        before = getattr(getattr(config, stage.stage), "init", None)
        state = "done" if stage.is_done else "begun" if stage.has_begun else ""
        shown = [f"{value:.1f}" for value in hours] if hours else ["-", "-"]
        table.add_row(stage.name, before or "", *shown, state)
    if any(totals):
        table.add_row("total", "", *(f"{total:.0f}" for total in totals), "")
    Console(width=_width()).print(table)


def collect_rows(plans: Mapping[str, Plan], *, baseline: str) -> list[dict[str, Any]]:
    """One record per row: our numbers from its test folder, the paper's, and the paired difference to the baseline."""
    rows = []
    for pair, plan in plans.items():
        scores = {row: _scores(folder, row) for row, folder in plan.results.items()}
        for row, folder in plan.results.items():
            model = json.loads((folder / "test" / "results.json").read_text())["models"][row]
            difference = compare(scores[row], scores[baseline])["average"] if row != baseline else None
            rows.append(
                {
                    "pair": pair,
                    "row": row,
                    "sets": {name: values["em"] for name, values in model["sets"].items()},
                    "average": model["average"]["em"],
                    "average_ci95": model["average"]["em_ci95"],
                    "num_questions": model["num_questions"],
                    "difference_to_baseline": difference,
                    "num_searches": model["average"]["num_searches"],
                    "answered": model["average"]["answered"],
                }
            )
    return rows


def _scores(folder: Path, row: str) -> list[Score]:
    return read_records(folder / "test" / row / "scores.jsonl")


def _write_table(folder: Path, name: str, plans: Mapping[str, Plan]) -> Path:
    baseline = BASELINE[name]
    rows = collect_rows(plans, baseline=baseline)
    atomic_write_text(folder / f"table_{name}.json", json.dumps({"baseline": baseline, "rows": rows}, indent=1) + "\n")
    text = render_markdown(rows, baseline=baseline)
    path = folder / f"table_{name}.md"
    atomic_write_text(path, text)
    print(text)
    return path


def render_markdown(rows: Sequence[Mapping[str, Any]], *, baseline: str) -> str:
    """A Markdown table: exact match by set as `ours (paper)`, the average with its interval, the paired difference."""
    sets = list(rows[0]["sets"])
    many_pairs = len({row["pair"] for row in rows}) > 1
    head = [*(["pair"] if many_pairs else []), "row", *(sets if len(sets) > 1 else []), "EM", "95% interval"]
    head += [f"against {baseline}", "searches", "answered", "paper"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["pair"]] if many_pairs else []
        cells.append(LABELS[row["row"]])
        if len(sets) > 1:
            cells += [_beside(row["sets"][each], paper_value(row["pair"], row["row"], each)) for each in sets]
        cells += [f"{row['average']:.3f}", _interval(row["average_ci95"])]
        difference = row["difference_to_baseline"]
        cells.append("" if difference is None else f"{difference[0]:+.3f} {_interval(difference[1:])}")
        paper = paper_value(MAIN_PAIR if row["pair"] == "tiny" else row["pair"], row["row"], "average")
        cells += [f"{row['num_searches']:.2f}", f"{row['answered']:.0%}", "-" if paper is None else f"{paper:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _beside(ours: float, paper: float | None) -> str:
    return f"{ours:.3f}" if paper is None else f"{ours:.3f} ({paper:.3f})"


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _width() -> int | None:
    """A log file has no width: enough for the table."""
    import sys

    return None if sys.stdout.isatty() else 130
