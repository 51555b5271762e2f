"""`summary.json`, the run's result in one small file, and the same as a table on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dgpo.config.schema import Config
from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import MANIFEST, package_versions

# Columns of the table that only some results have.
EXTRA_COLUMNS = {"em_sd": "deviation over samples", "em_ours": "EM, our parse"}


def write_summary(folder: Path, *, wall_s: Mapping[str, float], config: Config) -> Path:
    """Writes `summary.json` from `test/results.json`, with wall times of the stages. Returns its path."""
    return update_summary(folder, wall_s=wall_s, seed=config.seed)


def update_summary(folder: Path, *, wall_s: Mapping[str, float], seed: int) -> Path:
    """Writes `summary.json`; wall times of other stages that it already holds stay.

    Its form: {"methods": {name: {"em", "em_ci95", "num_questions", "teacher_term"}}, "wall_s", "versions", "seed"}.
    `teacher_term` is the form of the term that trained the checkpoint, or null.
    """
    path = Path(folder) / "summary.json"
    before = json.loads(path.read_text())["wall_s"] if path.exists() else {}
    times = {**wall_s, **{stage: seconds for stage, seconds in before.items() if stage not in wall_s}}
    results = read_results(folder)
    methods = {
        name: {
            "em": model["average"]["em"],
            "em_ci95": model["average"]["em_ci95"],
            "num_questions": model["num_questions"],
            "teacher_term": teacher_term_of(Path(model["checkpoint"])),
        }
        for name, model in results["models"].items()
    }
    summary = {"methods": methods, "wall_s": times, "versions": package_versions(), "seed": seed}
    atomic_write_text(path, json.dumps(summary, indent=1) + "\n")
    return path


def read_results(folder: Path) -> dict[str, Any]:
    """`test/results.json` of a run.

    Raises:
        FileNotFoundError: the run has not been tested.
    """
    path = Path(folder) / "test" / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `python -m dgpo test` with this run_dir first")
    return json.loads(path.read_text())


def teacher_term_of(checkpoint: Path) -> str | None:
    """The form of the teacher term that an RL checkpoint was trained with; None without one, or for other stages."""
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    if manifest.get("stage") != "train":
        return None
    config = manifest["config"]
    term = (yaml.safe_load(config) if isinstance(config, str) else config)["train"]["teacher_term"]
    return None if term["gate"] == "none" else term["form"]


def print_summary(folder: Path) -> None:
    """The headline table of a finished run, with the time of each stage below."""
    summary = json.loads((Path(folder) / "summary.json").read_text())
    print_results(read_results(folder))
    console = table_console()
    terms = {name: m["teacher_term"] for name, m in summary["methods"].items() if m["teacher_term"]}
    for name, term in terms.items():
        console.print(f"{name}: teacher term in its `{term}` form", highlight=False)
    if summary["wall_s"]:
        times = "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["wall_s"].items())
        console.print(f"time: {times}", highlight=False)


def print_results(results: Mapping[str, Any]) -> None:
    """One row per model: EM with its interval, the paired difference to the baseline, F1, searches, hits."""
    baseline = results["baseline"]
    sets = list(next(iter(results["models"].values()))["sets"])
    num_questions = next(iter(results["models"].values()))["num_questions"]
    title = f"Exact match on {num_questions} questions of {', '.join(sets)}{protocol_note(results)}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("model", style="bold")
    if len(sets) > 1:
        for name in sets:
            table.add_column(name, justify="right")
    for column in ("EM", "95% interval", *([f"against {baseline}"] if baseline else [])):
        table.add_column(column, justify="right")
    first = next(iter(results["models"].values()))["average"]
    extra = {name: label for name, label in EXTRA_COLUMNS.items() if name in first}
    for column in (*extra.values(), "F1", "answered", "searches", "hit"):
        table.add_column(column, justify="right")
    for name, model in results["models"].items():
        average = model["average"]
        cells = [name]
        if len(sets) > 1:
            cells += [f"{model['sets'][each]['em']:.3f}" for each in sets]
        cells += [f"{average['em']:.3f}", _interval(average["em_ci95"])]
        if baseline:
            difference = results["difference_to_baseline"].get(name)
            cells.append(
                f"{difference['average'][0]:+.3f} {_interval(difference['average'][1:])}" if difference else ""
            )
        cells += [f"{average[each]:.3f}" for each in extra]
        cells += [f"{average['f1']:.3f}", f"{average['answered']:.1%}"]
        cells += [f"{average['num_searches']:.2f}", f"{average['hit']:.1%}"]
        table.add_row(*cells)
    table_console().print(table)


def protocol_note(results: Mapping[str, Any]) -> str:
    """What sets these results apart from one greedy episode of every question; empty where nothing does."""
    if results.get("protocol", "ours") != "ours":
        dropped = f"last {results['num_dropped']} questions dropped, " if results["num_dropped"] else ""
        return (
            f"\n{results['protocol'].upper()}: one sample at temperature {results['temperature']:g}, {dropped}answers "
            "parsed from prompt and response, raw substring hits"
        )
    samples = results.get("samples", 1)
    return f"\nmean over {samples} samples at temperature {results['temperature']:g}" if samples > 1 else ""


def _interval(ends: list[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]".replace("[", "\\[")


def table_console() -> Console:
    """For tables: a log file has no width, and rich's 80 columns would break them up."""
    console = Console()
    return console if console.is_terminal else Console(width=130)
