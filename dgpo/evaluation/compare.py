"""Two runs beside each other: configuration, what they measured, and paired tests on the same questions.

python -m dgpo compare runs/dgpo runs/ppo [out=comparison.md]
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from dgpo.config.load import leaves, spelt
from dgpo.errors import ConfigError
from dgpo.evaluation.curves import RunCurves, read_curves, series
from dgpo.evaluation.scores import Score, average_samples, group_by, mean_of_sets
from dgpo.evaluation.stale import stale_models
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.metrics.intervals import paired_bootstrap
from dgpo.metrics.mcnemar import mcnemar_exact
from dgpo.runs.artifacts import recorded
from dgpo.runs.summary import read_results, table_console

STAGES = ("collect", "distill", "train", "test")
SECTION = b"\n## Configuration\n"  # the first of every comparison
IGNORED_KEYS = ("run_dir", "resume", "dry_run")  # where and how a stage was started, not what it did
LAST_STEPS = 10  # metrics are averaged over this many of the last steps that both runs logged
METRICS = (
    "episode/em",
    "episode/answered",
    "episode/num_searches",
    "episode/hit",
    "teacher/gate_fraction",
    "teacher/kl_failed",
    "teacher/kl_correct",
    "actor/kl_to_init",
    "actor/entropy",
    "response_length/mean",
    "timing_s/step",
)


@dataclass(frozen=True)
class Table:
    """One table of the comparison, as text."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def compare_runs(a: Path, b: Path) -> list[Table]:
    """The tables; one without rows says in its note what is missing or that there is no difference.

    Raises:
        FileNotFoundError: a folder does not exist, or holds nothing that a stage wrote.
    """
    for folder in (a, b):
        if not any((folder / stage).is_dir() for stage in STAGES):
            raise FileNotFoundError(f"{folder} is no run folder: none of {', '.join(STAGES)} is in it")
    return [_configurations(a, b), _training(a, b), _tests(a, b)]


def print_tables(tables: Sequence[Table]) -> None:
    """The tables on the console."""
    console = table_console()
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.head):
            shown.add_column(escape(name), justify="left" if number == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        if table.rows:
            console.print(shown)
        console.print(table.note if table.rows else f"{table.title}: {table.note}", highlight=False, markup=False)
        console.print()


def to_markdown(tables: Sequence[Table], *, title: str) -> str:
    """The tables as a Markdown page."""
    parts = [f"# {title}"]
    for table in tables:
        lines = [_markdown_row(table.head), "|" + "---|" * len(table.head), *map(_markdown_row, table.rows)]
        parts += [f"## {table.title}", table.note, *(["\n".join(lines)] if table.rows else [])]
    return "\n\n".join(parts) + "\n"


def write_comparison(arguments: Sequence[str]) -> Path:
    """Prints the tables and writes them as Markdown. Returns the file's path.

    Args:
        arguments: two run folders, and out=FILE.md; without that the file goes into the first.

    Raises:
        ConfigError: other arguments, or the file is there and is something else.
    """
    out = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    folders = [Path(argument) for argument in arguments if not argument.startswith("out=")]
    if len(folders) != 2:
        raise ConfigError(f"compare takes two run folders and out=FILE.md, not {' '.join(arguments) or 'nothing'}")
    a, b = folders
    path = Path(out[-1]) if out else a / f"compare_{b.name}.md"
    if path.exists() and SECTION not in path.read_bytes():
        raise ConfigError(f"out={path} exists and is no comparison: choose another file")
    tables = compare_runs(a, b)
    print_tables(tables)
    atomic_write_text(path, to_markdown(tables, title=f"{a} and {b}"))
    print(f"written to {path}")
    return path


def _markdown_row(cells: Sequence[str]) -> str:
    return (
        "| "
        + " | ".join(html.escape(cell, quote=False).replace("|", "\\|").replace("\n", " ") for cell in cells)
        + " |"
    )


def _configurations(a: Path, b: Path) -> Table:
    """Every key whose value differs in some stage, once for the stages in which it differs alike."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for stage in STAGES:
        left, right = (_stage_settings(folder, stage) for folder in (a, b))
        if not (left and right):
            continue
        for key in sorted({*left, *right}):
            values = (spelt(left.get(key, "-")), spelt(right.get(key, "-")))
            if values[0] != values[1]:
                found.setdefault((key, *values), []).append(stage)
    stages = {folder: [stage for stage in STAGES if _stage_settings(folder, stage)] for folder in (a, b)}
    shared = [stage for stage in stages[a] if stage in stages[b]]
    only = "; ".join(
        f"only {folder.name} has {', '.join(more)}"
        for folder, other in ((a, b), (b, a))
        if (more := [stage for stage in stages[folder] if stage not in stages[other]])
    )
    note = f"Compared: {', '.join(shared) or 'no stage is in both'}{f'; {only}' if only else ''}."
    rows = [(key, left, right, ", ".join(at)) for (key, left, right), at in sorted(found.items())]
    return Table("Configuration", note if rows else f"no difference. {note}", ("key", a.name, b.name, "stages"), rows)


def _stage_settings(folder: Path, stage: str) -> dict[str, Any]:
    """The settings and package versions that a stage recorded, by dotted key; empty where it did not run."""
    record = recorded(folder, stage)
    config = record.get("config", {})
    settings = {key: value for key, value in leaves(config) if key not in IGNORED_KEYS}
    settings |= {f"version of {name}": version for name, version in record.get("versions", {}).items()}
    own = str(config.get("run_dir", folder))
    return {key: value.replace(own, "RUN_DIR") if isinstance(value, str) else value for key, value in settings.items()}


def _training(a: Path, b: Path) -> Table:
    runs = [read_curves(folder, folder.name) for folder in (a, b)]
    logged = [{record["step"] for record in run.training} for run in runs if run.training]
    if not logged:
        return Table("Training", "neither run has been trained.", (), [])
    shared = sorted(set.intersection(*logged))
    rows = [("steps", *(str(len(run.training)) for run in runs))]
    rows += [("alarms", *(str(len(run.alarms)) for run in runs))]
    rows += [(name, *_means(runs, name, shared)) for name in METRICS]
    validation = sorted({name for run in runs for record in run.training for name in record if name.startswith("val-")})
    rows += [(name, *_means(runs, name, shared, last=1)) for name in validation if name.endswith("em/mean@1")]
    rows = [row for row in rows if any(cell not in ("-", "0") for cell in row[1:])]
    note = f"Means over the last {LAST_STEPS} steps that both runs logged; validation: the last of them."
    if len(logged) > 1:
        note += f" Both logged {shared[0]} to {shared[-1]}." if shared else " They share no step."
    return Table("Training", note, ("metric", a.name, b.name), rows)


def _means(
    runs: Sequence[RunCurves], metric: str, shared: Sequence[float], *, last: int = LAST_STEPS
) -> tuple[str, ...]:
    """The metric's mean in each run over the last of the shared steps at which every run that logs it has a number."""
    values = [
        {step: value for step, value in series(run.training, metric) if step in shared and math.isfinite(value)}
        for run in runs
    ]
    steps = [step for step in shared if all(step in of_run for of_run in values if of_run)][-last:]
    return tuple(f"{fmean(of_run[step] for step in steps):.4g}" if of_run and steps else "-" for of_run in values)


def _tests(a: Path, b: Path) -> Table:
    title = "Test results, paired on the same questions"
    untested = [folder.name for folder in (a, b) if not (folder / "test" / "results.json").exists()]
    if untested:
        return Table(title, f"{' and '.join(untested)} was not tested: run `python -m dgpo test` first.", (), [])
    results = [read_results(folder) for folder in (a, b)]
    shared = [name for name in results[0]["models"] if name in results[1]["models"]]
    pairs = [(name, name) for name in shared]
    ends = tuple(list(result["models"])[-1] for result in results)  # what the last stage made
    if ends not in pairs:
        pairs.append((ends[0], ends[1]))
    rows, left_out = [], 0
    for first, second in pairs:
        scores = [_scores(folder, name) for folder, name in ((a, first), (b, second))]
        matched, unmatched = match_scores(*scores)
        left_out += unmatched
        rows += _paired_rows(first if first == second else f"{first}, {second}", *matched)
    note = (
        "Difference: the second run minus the first, 95% interval by paired bootstrap over questions. Only "
        f"{a.name}, only {b.name}: questions that one run alone got right; p: McNemar's exact test on them."
    )
    for folder, result in zip((a, b), results, strict=True):
        note += "".join(f" {line}." for line in stale_models(folder / "test", result["models"]))
    if left_out:
        note += f" {left_out} episodes have no partner with the same question in the other run and are left out."
    difference = f"{b.name} minus {a.name}"
    head = ("models", "set", "questions", f"EM {a.name}", f"EM {b.name}", difference, "95% interval")
    return Table(title, note, (*head, f"only {a.name}", f"only {b.name}", "p"), rows)


def _scores(folder: Path, model: str) -> list[Score]:
    """One record per question; the mean of its samples where there are several."""
    return average_samples(read_jsonl(folder / "test" / model / "scores.jsonl", growing=True))


def match_scores(a: Sequence[Score], b: Sequence[Score]) -> tuple[tuple[list[Score], list[Score]], int]:
    """Episodes of both that answer the same question, in one order, and the number of those without a partner.

    The same question is the same id with the same text and golds: an id alone may mean another file's row.
    """
    others = {score["episode_id"]: score for score in b}
    matched = [
        (score, other)
        for score in a
        if (other := others.get(score["episode_id"]))
        and (score["question"], score["golds"]) == (other["question"], other["golds"])
    ]
    both = ([score for score, _ in matched], [other for _, other in matched])
    return both, len(a) + len(b) - 2 * len(matched)


def _paired_rows(name: str, a: Sequence[Score], b: Sequence[Score]) -> list[tuple[str, ...]]:
    """A row per set, and one for their unweighted mean where there are several."""
    if not a:
        return []
    mine, theirs = group_by(a, "set"), group_by(b, "set")
    em = {each: [[score["em"] for score in group[each]] for group in (mine, theirs)] for each in mine}
    rows = [_row(name, set_name, values, paired_bootstrap(*reversed(values))) for set_name, values in em.items()]
    if len(em) > 1:
        means = [fmean(fmean(values[side]) for values in em.values()) for side in (0, 1)]
        difference = mean_of_sets([[y - x for x, y in zip(*values, strict=True)] for values in em.values()])
        cells = (f"{means[0]:.3f}", f"{means[1]:.3f}", *_difference_cells(difference), "", "", "")
        rows.append((name, "mean of sets", str(len(a)), *cells))
    return rows


def _row(name: str, set_name: str, em: Sequence[Sequence[float]], difference: Sequence[float]) -> tuple[str, ...]:
    cells = (name, set_name, str(len(em[0])), *(f"{fmean(values):.3f}" for values in em))
    cells = (*cells, *_difference_cells(difference))
    if any(value not in (0.0, 1.0) for values in em for value in values):
        return (*cells, "", "", "")  # means over several samples: nothing to count
    only = [sum(x > y for x, y in zip(*order, strict=True)) for order in (em, em[::-1])]
    return (*cells, str(only[0]), str(only[1]), f"{mcnemar_exact(*only):.2g}")


def _difference_cells(difference: Sequence[float]) -> tuple[str, str]:
    return f"{difference[0]:+.3f}", f"[{difference[1]:+.3f}, {difference[2]:+.3f}]"
