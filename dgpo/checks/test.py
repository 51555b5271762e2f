"""Checks of `test` and `arcap`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.agent.modes import MODES, Mode, mode_messages
from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model
from dgpo.checks.prompts import PromptReader
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_values, nearest
from dgpo.config.schema import Config
from dgpo.data.benchmarks import BENCHMARKS
from dgpo.data.rows import row_question
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_engine
from dgpo.hardware.machine import check_start

LOGGERS = ("console", "tensorboard", "wandb")


def check_test(config: Config, stage: str = "test") -> list[str]:
    """What evaluation (`test`, or `arcap`) needs: checkpoints, test sets, lengths, a retriever, a free folder."""
    notes: list[str] = []
    check_test_settings(config)
    check_start(config, stage)
    check_stage_folder(config, stage)
    if not config.test.models:
        raise ConfigError("test.models is empty: name checkpoints, e.g. test.models.dgpo=runs/dgpo/train/model")
    if not config.data.test_files and not config.dry_run.assume:
        raise ConfigError("data.test_files is empty: name test sets, e.g. data.test_files.nq=data/nq_test.parquet")
    if stage == "arcap" and set(config.test.modes.values()) - {"agent"}:
        raise ConfigError(f"test.modes={config.test.modes}: ARCap is of agents, a baseline searches once or never")
    readers: dict[str, PromptReader] = {}
    trust = config.student.trust_remote_code
    for name, path in config.test.models.items():
        if check_model(config, path, key=f"test.models.{name}", notes=notes):
            check_lengths(config, f"test.models.{name}", path)
            readers[name] = PromptReader(path, key=f"test.models.{name}", trust_remote_code=trust)
            readers[name].check_template()
    rows: list[dict[str, Any]] = []
    for name in config.test.sets or config.data.test_files:
        chosen = _check_test_set(config, name, notes)[: config.test.max_questions]
        source = f"data.test_files.{name}={config.data.test_files[name]}"
        for model, reader in readers.items():
            asked = _as_asked(chosen, MODES[config.test.modes.get(model, "agent")])
            reader.check_lengths(asked, source=source, limit=config.episode.max_prompt_tokens)
        rows += chosen
    if rows and config.test.compat == "upstream" and len(rows) < config.test.upstream_batch_size:
        raise ConfigError(
            f"test.compat=upstream drops the last batch when it is not full, and {len(rows)} questions fill none of "
            f"test.upstream_batch_size={config.test.upstream_batch_size}: lower it"
        )
    check_retriever(config, rows, notes)
    return notes


def _as_asked(rows: Sequence[Mapping[str, Any]], mode: Mode) -> list[dict[str, Any]]:
    """The rows with the prompts of a mode."""
    return [{**row, "prompt": mode_messages(mode, row_question(row), row["prompt"])} for row in rows]


def check_test_settings(config: Config) -> None:
    """What needs no file to be told; models and sets may still be named by whoever starts the stage."""
    check_values(config, "hardware", "episode", "test")
    check_engine(config)
    test = config.test
    for key, names in (("test.models", test.models), ("data.test_files", config.data.test_files)):
        for name in names:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ConfigError(f"{key}: the name {name!r} becomes a folder: use letters, digits and ._+- only")
    for name in test.sets or []:
        if name not in config.data.test_files:
            raise ConfigError(f"test.sets: unknown set {name!r}: {nearest(name, config.data.test_files)}")
    for name, mode in test.modes.items():
        if name not in test.models:
            raise ConfigError(f"test.modes.{name}={mode}: {nearest(name, test.models)}")
        if mode not in MODES:
            raise ConfigError(f"test.modes.{name}={mode}: {nearest(mode, MODES)}")
    if test.baseline is not None and test.baseline not in test.models:
        raise ConfigError(f"test.baseline={test.baseline}: expected one of test.models, {', '.join(test.models)}")
    for logger in test.loggers:
        if logger not in LOGGERS:
            raise ConfigError(f"test.loggers: unknown logger {logger!r}: {nearest(logger, LOGGERS)}")
    if test.samples > 1 and test.temperature == 0:
        raise ConfigError(
            f"test.samples={test.samples} with test.temperature=0 plays the same episode again: set a temperature "
            "above 0, or leave it out"
        )
    if test.compat == "upstream" and (test.samples > 1 or test.temperature not in (None, 1.0)):
        raise ConfigError(
            f"test.compat=upstream takes one sample at temperature 1, but test.samples={test.samples} and "
            f"test.temperature={test.temperature}: leave both out"
        )


def _check_test_set(config: Config, name: str, notes: list[str]) -> list[dict[str, Any]]:
    """The rows, each with an id of its own, and of the benchmark that the set is named after, if it is one."""
    key, file = f"data.test_files.{name}", config.data.test_files[name]
    rows = check_rows(config, file, key=key, notes=notes, named=True)
    sources = {row["data_source"] for row in rows}
    if name in BENCHMARKS and sources & set(BENCHMARKS) - {name}:
        raise ConfigError(f"{key}={file}: its rows are of {', '.join(sorted(sources))}: name the set after them")
    return rows
