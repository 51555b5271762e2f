"""What a table needs and does not find yet, all of it at once: data, test sets, the retriever, models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dgpo.checks.files import check_rows
from dgpo.checks.models import check_model
from dgpo.checks.search import check_retriever
from dgpo.config.schema import Config
from dgpo.errors import ConfigError, one_line
from dgpo.evaluation.paper import SETS
from dgpo.pipeline.plan import Plan


def missing(config: Config, plan: Plan) -> tuple[list[str], list[str]]:
    """(what must be there before the first stage starts, notes on what the table will lack or could not be checked).

    Args:
        config: of the table, with the pair's models.
        plan: its stages.
    """
    notes: list[str] = []
    stages = {stage.stage for stage in plan.stages}
    faults = [fault for check in _checks(config, stages, notes) if (fault := _fault(check))]
    if "train" in stages and not config.data.validation_file:
        notes.append("data.validation_file is not set: no best step on validation, the table has the last step alone")
    absent = [name for name in SETS if name not in config.data.test_files]
    if {"test", "arcap"} & stages and 0 < len(absent) < len(SETS):
        notes.append(f"data.test_files lacks {', '.join(absent)}: the average is not over the paper's seven sets")
    return faults, notes


def _checks(config: Config, stages: set[str], notes: list[str]) -> Iterator[Callable[[], object]]:
    data = config.data
    if "collect" in stages:
        yield lambda: check_rows(config, data.collect_file, key="data.collect_file", notes=notes)
    if "train" in stages:
        yield lambda: check_rows(config, data.train_file, key="data.train_file", notes=notes)
        if data.validation_file:
            yield lambda: check_rows(config, data.validation_file, key="data.validation_file", notes=notes)
    if {"test", "arcap"} & stages:
        if not data.test_files:
            yield lambda: _refuse("data.test_files is empty: name test sets, or take data=prepared")
        for name, file in data.test_files.items():
            yield partial(check_rows, config, file, key=f"data.test_files.{name}", notes=notes)
    for key, path in (("student.path", config.student.path), ("teacher.path", config.teacher.path)):
        if not (key == "teacher.path" and _is_made_here(config)):
            yield partial(check_model, config, path, key=key, notes=notes)
    yield lambda: check_retriever(config, [], notes)


def _is_made_here(config: Config) -> bool:
    return bool(config.teacher.init) and Path(config.teacher.path or "").parts[-2:] == ("train", "model")


def _refuse(message: str) -> None:
    raise ConfigError(message)


def _fault(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ConfigError as error:
        return one_line(error)
    return None
