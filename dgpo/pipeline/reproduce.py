"""The paper's tables and figures: plan the stages, run what is missing, and print our numbers beside the paper's.

python -m dgpo reproduce table=main world=tiny hardware=cpu run_dir=runs/tables
python -m dgpo reproduce table=contrasts world=tiny hardware=cpu run_dir=runs/contrasts "seeds=[31,32,33]"
python -m dgpo reproduce table=gate world=tiny hardware=cpu run_dir=runs/gate "seeds=[41,42,43,44,45]"
python -m dgpo reproduce table=pairs data=prepared retriever.url=http://node0:8000 run_dir=runs/tables dry_run=true
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgpo.checks import check_settings
from dgpo.config.load import chosen, group_choices, load_config
from dgpo.config.schema import Config
from dgpo.config.stages import MODEL_STEPS
from dgpo.errors import ConfigError
from dgpo.evaluation import gate
from dgpo.evaluation.arcap_chart import ARCAP_FILE
from dgpo.evaluation.charts import line_file
from dgpo.evaluation.paper import (
    FIGURES,
    LABELS,
    MAIN_PAIR,
    ROWS,
    RULES,
    TABLES,
    TEACHER_TIME,
    TINY_TABLES,
    paper_value,
    protocol_note,
)
from dgpo.evaluation.report import write_report
from dgpo.evaluation.scores import Score, compare
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.hardware.disk import hub_disk
from dgpo.hardware.gpu_hours import gpu_hours_range
from dgpo.hardware.machine import check_start
from dgpo.hardware.report import besides
from dgpo.hardware.stages import hours_and_disk
from dgpo.pipeline import tiny
from dgpo.pipeline.gate import check_cold_start, write_gate
from dgpo.pipeline.missing import missing
from dgpo.pipeline.over_seeds import write_over_seeds
from dgpo.pipeline.plan import START, Plan, PlannedStage, distinct, plan_table
from dgpo.pipeline.processes import Stages, python_module
from dgpo.pipeline.reuse import is_current
from dgpo.pipeline.tuning import GRIDS, write_tuning
from dgpo.runs.alarms import ALARMS
from dgpo.runs.owner import owned
from dgpo.runs.settings import record_or_check_command

BASELINE = {
    "main": "kd",
    "ablation": "dgpo",
    "contrasts": "kd",
    "pairs": "kd",
    "gate": "kd",
}  # the row that the paired differences are against
SETTINGS = "reproduce.json"


def reproduce(overrides: Sequence[str]) -> Path | None:
    """Runs what is missing of a table into `run_dir`; what is complete there, of the same models and data, stays.

    Returns:
        The table as a Markdown file (figures: the last page), or None for a dry run, which prints the plan.

    Raises:
        ConfigError: an override is wrong, the folder or a stage in it was made with other settings, another command
            works in the folder, or, of a dry run, something is missing, all of which it lists; nothing was started.
        DgpoError: a stage failed; the same command continues.
    """
    config = load_config(overrides)
    if config.seeds:
        return _over_seeds(config, overrides)
    if config.table in TINY_TABLES:
        raise ConfigError(f"table={config.table} without seeds: its page in docs/results names them")
    return _one_seed(config, overrides)


def _one_seed(config: Config, overrides: Sequence[str], *, only_start: bool = False) -> Path | None:
    """With `only_start` it ends, in tables whose cold start is checked, with that check."""
    pairs = _pairs(config, overrides)
    folder = Path(config.run_dir)
    own = [o for o in overrides if not o.startswith(("pair=", "run_dir=", "dry_run", "table=", "rows."))]
    if config.dry_run.assume:
        own = [*(o for o in own if not o.startswith("hardware=")), f"hardware={config.dry_run.assume}"]
    if config.dry_run:
        check_start(config, "train")
        _dry_run(pairs, folder, config, own)
        return None
    with owned(folder / "reproduce"):
        record_or_check_command(folder / SETTINGS, own)  # rows.NAME: each stage compares its own settings
        check_start(config, "train")
        stages = Stages(folder)
        plans: dict[str, Plan] = {}
        for pair in pairs:
            with _inputs(pair, stages, folder, config) as inputs:
                plan = plans[pair] = _plan(pair, folder, config, inputs, own)
                _print_plan(pair, plan)
                for stage in plan.stages:
                    if not (stage.is_done and is_current(stage)):
                        resume = ["resume=true"] if stage.has_begun else []
                        stages.run(**{stage.name: [*python_module("dgpo"), *stage.command, *resume]})
                    if stage.run_dir.name == START:
                        check_cold_start(stage.run_dir)
                        if only_start:
                            return None
        return _write(folder, config.table, plans)


def _over_seeds(config: Config, overrides: Sequence[str]) -> Path | None:
    """The whole table with every seed, in a folder of its own, then their means and contrasts."""
    _pairs(config, overrides)
    of_seeds = dict.fromkeys((*BASELINE, *TINY_TABLES))
    if config.table not in of_seeds:
        raise ConfigError(f"seeds={config.seeds} with table={config.table}: expected one of {', '.join(of_seeds)}")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds={config.seeds}: a seed is named twice")
    shared = [each for each in overrides if not each.startswith(("seeds=", "seed=", "run_dir="))]
    checks_start = config.table in gate.TABLES and not config.dry_run
    for only_start in (True, False) if checks_start else (False,):
        for seed in config.seeds:
            own = [*shared, f"seed={seed}", f"run_dir={config.run_dir}/seed_{seed}"]
            _one_seed(load_config(own), own, only_start=only_start)
    folder = Path(config.run_dir)
    if config.dry_run:
        return None
    if config.table in GRIDS:
        return write_tuning(folder, config.table, config.seeds, overrides)
    if config.table == "gate":
        return write_gate(folder, config.seeds)
    return write_over_seeds(folder, config.table, config.seeds)


def _dry_run(pairs: Sequence[str], folder: Path, config: Config, own: Sequence[str]) -> None:
    """Prints the plans, then once what is missing; the tiny world makes its own inputs."""
    faults, notes = [], []
    costs: dict[str, Cost] = {}  # pairs share stages, which have the same name
    hub: dict[str, float] = {}
    unsized: dict[str, None] = {}
    for pair in pairs:
        inputs = ["student.path=student", "teacher.path=teacher"] if pair == "tiny" else [f"pair={pair}"]
        plan = _plan(pair, folder, config, inputs, own)
        costs |= _print_plan(pair, plan)
        if pair != "tiny":
            own_config = load_config([*inputs, *own, "dry_run=true"])
            sizes, unknown = hub_disk(own_config)
            hub, unsized = hub | sizes, unsized | dict.fromkeys(unknown)
            found = missing(own_config, plan)
            faults += found[0]
            notes += found[1]
    total = Cost.sum(costs.values())
    print(
        f"all together: {total.hours:.0f} hours ({total.counted:.0f} GPU hours counted, {total.paper:.0f} as in the "
        f"paper), {total.disk / 1e9:.0f} GB in run_dir"
    )
    if hub:
        print(f"besides: {besides(hub, list(unsized))}")
    for name, lines in (("note", dict.fromkeys(notes)), ("missing", dict.fromkeys(faults))):
        for line in lines:
            print(f"{name}: {line}")
    if faults:
        raise ConfigError(f"{len(dict.fromkeys(faults))} things are missing, listed above; nothing was started")


def _plan(pair: str, folder: Path, config: Config, inputs: Sequence[str], own: Sequence[str]) -> Plan:
    student = load_config([*inputs, *own]).student.path or ""
    shared = folder / (pair if pair == "tiny" else Path(student).name)
    defaults = gate.DEFAULTS if config.table in gate.TABLES else ()
    plan = plan_table(config.table, folder / pair, shared, [*inputs, *defaults], own, config.rows)
    for stage in plan.stages:
        check_settings(stage.config, [stage.stage])
    return plan


def _pairs(config: Config, overrides: Sequence[str]) -> list[str]:
    if config.table not in TABLES:
        raise ConfigError(f"table={config.table}: expected one of {', '.join(TABLES)}")
    if unknown := set(config.rows) - set(ROWS[config.table]):
        raise ConfigError(f"rows.{sorted(unknown)[0]}: no row of table={config.table}: {', '.join(ROWS[config.table])}")
    for name in ("experiment", "train.init", "distill.episodes", "stages"):
        if chosen(name, overrides):
            raise ConfigError(f"{name}=... in `reproduce`: the rows of the table decide that; leave it out")
    if chosen("world", overrides) == "tiny":
        if config.table == "pairs":
            raise ConfigError("table=pairs with world=tiny: the tiny world has one pair; take table=main or ablation")
        return ["tiny"]
    if config.table in TINY_TABLES:
        raise ConfigError(f"table={config.table} is of the tiny world: add world=tiny hardware=cpu")
    return group_choices("pair") if config.table == "pairs" else [chosen("pair", overrides) or MAIN_PAIR]


@contextlib.contextmanager
def _inputs(pair: str, stages: Stages, folder: Path, config: Config) -> Iterator[list[str]]:
    if pair != "tiny":
        yield [f"pair={pair}"]
        return
    biased = gate.RELATION if config.table in gate.TABLES else None
    tiny.build_missing(stages, folder / "tiny", seed=config.seed, num_test=tiny.NUM_TEST, biased=biased)
    with tiny.served(stages, folder / "tiny") as inputs:
        yield inputs


@dataclass(frozen=True)
class Cost:
    """What a stage, or several one after the other, take; 0 where it is not known.

    Attributes:
        counted, paper: GPU hours by arithmetic, and scaled from the authors' run.
        hours: by the clock, of those counted.
        disk: bytes in `run_dir`.
    """

    counted: float = 0.0
    paper: float = 0.0
    hours: float = 0.0
    disk: float = 0.0

    @classmethod
    def of(cls, stage: PlannedStage) -> Cost:
        hours, disk = hours_and_disk(stage.config, stage.stage)
        return cls(*(gpu_hours_range(stage.config, stage.stage) or (0.0, 0.0)), hours or 0.0, disk)

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        return cls(*map(sum, zip(*map(astuple, costs), strict=True)))

    def cells(self) -> list[str]:
        """The cells of its row: a dash for hours that are not known, nothing for little disk."""
        hours = [f"{value:.1f}" if value else "-" for value in (self.counted, self.paper, self.hours)]
        return [*hours, f"{self.disk / 1e9:.1f}" if self.disk else ""]


def _print_plan(pair: str, plan: Plan) -> dict[str, Cost]:
    """Returns what each stage takes."""
    table = Table(title=f"Stages for {pair}", title_justify="left")
    for column in ("stage", "starts from", "GPU hours: counted", "as in the paper", "hours", "disk, GB", ""):
        table.add_column(column, justify="left" if column in ("stage", "starts from", "") else "right")
    costs = {stage.name: Cost.of(stage) for stage in plan.stages}
    for stage in plan.stages:
        before = getattr(getattr(stage.config, stage.stage, None), "init", None)
        state = "done" if stage.is_done else "begun" if stage.has_begun else ""
        table.add_row(stage.name, before or "", *costs[stage.name].cells(), state)
    table.add_row("total", "", *Cost.sum(costs.values()).cells(), "")
    Console(width=_width()).print(table)
    return costs


def _write(folder: Path, table: str, plans: Mapping[str, Plan]) -> Path:
    if table in GRIDS:
        return folder  # the seeds together choose
    if table == "figures":
        return [_write_figure(folder, pair, plan, number) for pair, plan in plans.items() for number in FIGURES][-1]
    if table == "arcap":
        return next(iter(plans.values())).stages[-1].run_dir / ARCAP_FILE  # the stage itself printed it
    return _write_teacher_time(folder, plans) if table == "teacher_time" else _write_table(folder, table, plans)


def _write_figure(folder: Path, pair: str, plan: Plan, number: str) -> Path:
    """The curves of a figure's runs on one page, and those of exact match as a drawing."""
    first, *others = (plan.runs[row] for row in FIGURES[number])
    path = folder / f"figure_{number}_{pair}.html"
    shutil.move(write_report(first, others), path)
    records = {row: read_jsonl(plan.runs[row] / "train" / "metrics.jsonl") for row in FIGURES[number]}
    lines = {LABELS[row]: [(each["step"], each["episode/em"]) for each in records[row]] for row in records}
    drawing = line_file(lines, x_label="step", y_label="Exact match of the training episodes")
    atomic_write_text(path.with_suffix(".svg"), drawing)
    print(f"figure {number}, curves of {', '.join(FIGURES[number])}: {path}, {path.with_suffix('.svg').name}")
    return path


def _write_teacher_time(folder: Path, plans: Mapping[str, Plan]) -> Path:
    """What the teacher adds to a step, by the steps' own timings, beside the paper's share of the whole training."""
    lines = ["| run | steps | a step, s | of that the teacher, s | adds | paper |", "|---|---|---|---|---|---|"]
    for pair, plan in plans.items():
        for row, run in plan.runs.items():
            records = read_jsonl(run / "train" / "metrics.jsonl")
            step = sum(record["timing_s/step"] for record in records) / len(records)
            teacher = sum(record.get("timing_s/teacher", 0.0) for record in records) / len(records)
            paper = "-" if pair == "tiny" else f"{TEACHER_TIME:.1%}"
            added = f"{teacher / (step - teacher):.1%}"
            lines.append(f"| {pair} {LABELS[row]} | {len(records)} | {step:.1f} | {teacher:.2f} | {added} | {paper} |")
    text = "\n".join(lines) + "\n"
    atomic_write_text(folder / "table_teacher_time.md", text)
    print(text)
    return folder / "table_teacher_time.md"


def collect_rows(plans: Mapping[str, Plan], *, baseline: str) -> list[dict[str, Any]]:
    """One record per row: `last`, `best` and `paper`, its checkpoints by their rules, in their numbers.

    A checkpoint that a row does not have is None; one that is the same as an earlier one was tested once.
    """
    rows = []
    for pair, plan in plans.items():
        baseline_scores = _scores(plan.results[baseline], baseline)
        for row, test in plan.results.items():
            results = json.loads((test.run_dir / "test" / "results.json").read_text())
            tested = distinct(test.models)
            numbers = {"last": row, "best": f"{row}-best", "paper": f"{row}-paper"}
            record: dict[str, Any] = {"pair": pair, "row": row, "rule": _rule(row, test)}
            for column, name in numbers.items():
                if name in tested:
                    shown = _numbers(results["models"][tested[name]])
                    scores = _scores(test, tested[name])
                    record[column] = {**shown, "difference": compare(scores, baseline_scores)["average"]}
            record["temperature"], record["protocol"] = results["temperature"], results["protocol"]
            rows.append({"best": None, "paper": None, **record})
    return rows


def _rule(row: str, test: PlannedStage) -> str:
    """How the paper's checkpoint was chosen; or what stands there, where none is from before the collapse."""
    rule = RULES.get(row, "last")
    if rule == "before_collapse":
        stage = Path(test.models[f"{row}-paper"]).parents[1]
        alarms = read_jsonl(stage / ALARMS, growing=True)
        step = json.loads((stage / MODEL_STEPS).read_text())[rule] if alarms else 0
        if alarms and step > alarms[0]["first_step"] - 2:
            return f"step {step}, the first kept: none is from before the collapse"
    return rule


def _numbers(model: Mapping[str, Any]) -> dict[str, Any]:
    average = model["average"]
    return {
        "sets": {name: values["em"] for name, values in model["sets"].items()},
        "average": average["em"],
        "ci95": average["em_ci95"],
        "num_questions": model["num_questions"],
        "num_searches": average["num_searches"],
        "answered": average["answered"],
    }


def _scores(test: PlannedStage, name: str) -> list[Score]:
    return read_jsonl(test.run_dir / "test" / name / "scores.jsonl")


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
    """Two Markdown tables: every row's last step and its best on validation; what the paper reports, beside the paper.

    Differences are of the last steps, paired by question.
    """
    ours = _render_ours(rows, baseline=baseline)
    beside = _render_beside(rows)
    if not beside:
        return ours
    upstream = all(row["protocol"] != "ours" for row in rows)
    note = protocol_note({row["temperature"] for row in rows}, upstream=upstream)
    return f"{ours}\nThe checkpoint that the paper reports (`rule`), as ours (paper's). {note}\n\n{beside}"


def _render_ours(rows: Sequence[Mapping[str, Any]], *, baseline: str) -> str:
    many_pairs = len({row["pair"] for row in rows}) > 1
    head = [*(["pair"] if many_pairs else []), "row", "EM, last step", "95% interval", "EM, best on validation"]
    head += ["95% interval", f"last against {baseline}", "searches", "answered"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        last, best = row["last"], row["best"]
        cells = [row["pair"]] if many_pairs else []
        cells += [LABELS[row["row"]], f"{last['average']:.3f}", _interval(last["ci95"])]
        cells += [f"{best['average']:.3f}", _interval(best["ci95"])] if best else ["-", "-"]
        difference = last["difference"]
        cells.append("" if row["row"] == baseline else f"{difference[0]:+.3f} {_interval(difference[1:])}")
        lines.append(_line([*cells, f"{last['num_searches']:.2f}", f"{last['answered']:.0%}"]))
    return "\n".join(lines) + "\n"


def _render_beside(rows: Sequence[Mapping[str, Any]]) -> str:
    """Empty where no pair of the rows is the paper's."""
    lines = []
    sets = list(rows[0]["last"]["sets"])
    for row in rows:
        paper = {each: paper_value(row["pair"], row["row"], each) for each in (*sets, "average")}
        if paper["average"] is None:
            continue
        own = row["paper"] or row["last"]
        values = {**own["sets"], "average": own["average"]}
        cells = [row["pair"], LABELS[row["row"]], row["rule"]]
        lines.append(_line([*cells, *(_beside(values[each], paper[each]) for each in paper)]))
    if not lines:
        return ""
    head = ["pair", "row", "rule", *sets, "average"]
    return "\n".join([_line(head), "|" + "---|" * len(head), *lines]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _beside(ours: float, paper: float | None) -> str:
    return f"{ours:.3f}" if paper is None else f"{ours:.3f} ({paper:.3f})"


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _width() -> int | None:
    """A log file has no width: enough for the table."""
    import sys

    return None if sys.stdout.isatty() else 130
