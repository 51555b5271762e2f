"""`dry_run=true`: prints what a stage would do, on what, with how much memory and time; refuses what will not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from dgpo.config.load import changed_settings, recipe_settings
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.hardware.budget import Models, find_gpu, is_on_this_node
from dgpo.hardware.checks import check_engine, check_heads, check_training
from dgpo.hardware.disk import hub_disk
from dgpo.hardware.fit import explain, nearest_fit
from dgpo.hardware.gpu_hours import paper_gpu_hours
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.machine import check_machine, memory_limit
from dgpo.hardware.placement import place
from dgpo.hardware.report import (
    Rows,
    Rows3,
    besides,
    experiment_table,
    facts,
    memory_facts,
    memory_table,
    parameters,
    placement_table,
    time_facts,
    time_table,
)
from dgpo.hardware.stages import hours_and_disk, stage_budget, stage_models, stage_throughput

WIDTH = 120


def print_dry_run(config: Config, stage: str, what: str, notes: Sequence[str], *, rows: int | None = None) -> None:
    """Prints the plan of a stage whose configuration was checked.

    Args:
        what: what would run, in one sentence.
        notes: what could not be checked, and why.
        rows: questions or episodes that the stage was seen to have.

    Raises:
        ConfigError: it will not fit, with the nearest setting that does; or this machine has not these GPUs.
    """
    config = _with_own_memory(config)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(f"dry run: {what}", soft_wrap=True, markup=False)
    console.print("\nSettings that differ from the defaults")
    for setting in changed_settings(config):
        console.print(f" {setting}", soft_wrap=True, markup=False)
    recipe = recipe_settings(config, stage)
    heading = "\nSettings on which the paper and our recommendation differ (recipe=paper|recommended)"
    console.print(heading if recipe else "")
    for setting in recipe:
        console.print(f" {setting}", soft_wrap=True, markup=False)
    console.print()
    for note in [*notes, *_placement_notes(config, stage)]:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    models, unknown = stage_models(config, stage)
    if models is None:
        console.print(f"note: no estimate, the shape of {' and '.join(unknown)} is not known", soft_wrap=True)
        return
    check_heads(config, models.student.heads)
    _print_plan(console, config, stage, models, rows)
    budget = stage_budget(config, stage, models)
    if budget.problem:
        fit = nearest_fit(config, stage, models, is_valid=lambda changed: _is_valid(changed, stage, models))
        raise ConfigError(explain(budget, fit))
    check_machine(config, stage)


def _with_own_memory(config: Config) -> Config:
    """A copy that knows how much memory this machine has, where the plan is for it and none was named."""
    hardware = config.hardware
    if config.dry_run.assume or hardware.platform != "cpu" or hardware.host_memory_gb is not None:
        return config
    return replace(config, hardware=replace(hardware, host_memory_gb=memory_limit() / 1e9))


def _print_plan(console: Console, config: Config, stage: str, models: Models, rows: int | None) -> None:
    hardware, gpu = config.hardware, find_gpu(config.hardware)
    budget = stage_budget(config, stage, models)
    of = f"per GPU, GiB (of {gpu.name}, {gpu.memory / GIB:.1f} usable)" if gpu else f"of a {budget.place}, GiB"
    parts: list[tuple[str, Any]] = [
        ("Models", facts(_model_rows(stage, models))),
        ("Placement", placement_table(config, stage, models, place(config, stage))),
        (f"Memory {of}", memory_table(budget)),
        ("", facts(memory_facts(config, budget))),
    ]
    estimate = stage_throughput(config, stage, models, rows=rows)
    if estimate is not None:
        parts.append((f"Time, estimated, of {'a step' if estimate.steps > 1 else 'the stage'}", time_table(estimate)))
        parts.append(("", facts(time_facts(estimate, hardware.num_gpus))))
        if stage == "train":
            hours = f"{paper_gpu_hours(config) or 0:,.0f} GPU hours of H200, scaled from the authors' run"
            parts.append(("", facts([("the paper", hours)])))
    parts.append(("The experiment, estimated", experiment_table(_experiment(config))))
    parts.append(("", facts([("besides", besides(*hub_disk(config)))])))
    for title, table in parts:
        if title:
            console.print(f"\n{title}")
        if table.row_count:
            console.print(table)


def _experiment(config: Config) -> Rows3:
    """(stage, hours, bytes on the disk) of every stage, and the test at the end, on this hardware."""
    rows = [(stage, *hours_and_disk(config, stage)) for stage in config.stages]
    return [*rows, ("test", *hours_and_disk(_tested(config), "test"))]


def _tested(config: Config) -> Config:
    """The test of one model, the student's size, where none is named."""
    models = config.test.models or {"student": config.student.path or ""}
    return replace(config, test=replace(config.test, models=models))


def _model_rows(stage: str, models: Models) -> Rows:
    name = {"train": "student", "distill": "student", "collect": "teacher"}.get(stage, "model")
    rows = [(name, parameters(models.student.parameters))]
    if models.critic:
        rows.append(("critic", parameters(models.student.critic)))
    if models.teacher is not None:
        rows.append(("teacher", f"{parameters(models.teacher.parameters)}, frozen"))
    return rows


def _placement_notes(config: Config, stage: str) -> list[str]:
    retriever = config.retriever
    notes: list[str] = []
    if stage == "distill" or retriever.backend or not is_on_this_node(retriever.url):
        return notes
    if config.hardware.num_nodes > 1:
        notes.append(
            f"retriever.url={retriever.url} is another machine on every node: episodes on the other nodes find no "
            "retriever there, unless one runs on each"
        )
    if retriever.host_memory_gb is None:
        notes.append(
            "the retriever's memory is not counted: set retriever.host_memory_gb (65 for a flat index of Wikipedia)"
        )
    return notes


def _is_valid(config: Config, stage: str, models: Models) -> bool:
    try:
        check_engine(config)
        check_heads(config, models.student.heads)
        if stage == "train":
            check_training(config)
    except ConfigError:
        return False
    return True
