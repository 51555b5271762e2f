"""What a chain of jobs reads that nothing in it writes: looked at before it waits in the queue."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

from dgpo.config.methods import has_teacher
from dgpo.config.model_files import check_model_folder
from dgpo.config.stages import initial_model
from dgpo.errors import ConfigError
from dgpo.slurm.options import JobOptions


def missing_inputs(options: JobOptions) -> list[str]:
    """A line for each file, index and model that is not where the stages will look for it."""
    return [*_files(options), *_indexes(options), *_models(options)]


def _files(options: JobOptions) -> Iterator[str]:
    data = options.config.data
    wanted = {"collect": {"data.collect_file": data.collect_file}}
    wanted["train"] = {"data.train_file": data.train_file}
    wanted["train"] |= {"data.validation_file": data.validation_file} if data.validation_file else {}
    wanted["test"] = {f"data.test_files.{name}": file for name, file in data.test_files.items()}
    if "test" in options.stages and not data.test_files:
        yield "data.test_files is empty: name test sets, e.g. data.test_files.nq=data/nq_test.parquet"
    for stage in options.stages:
        for key, file in wanted.get(stage, {}).items():
            if not file:
                yield f"{key} is not set, and {stage} reads it"
            elif not Path(file).is_file():
                yield f"{key}={file} does not exist"


def _indexes(options: JobOptions) -> Iterator[str]:
    words = shlex.split(options.retriever)
    for flag, value in itertools.pairwise(words):
        folder = value.partition("=")[2] or value
        if flag == "--index" and not Path(folder).is_dir():
            yield f"--retriever: the index {folder} does not exist: retriever.build or retriever.convert makes it"


def _models(options: JobOptions) -> Iterator[str]:
    config = options.config
    wanted: dict[str, str | None] = {"teacher.path": config.teacher.path} if "collect" in options.stages else {}
    if "test" in options.stages:
        wanted |= {f"test.models.{name}": path for name, path in config.test.models.items()}
    for stage in options.stages:
        if stage in ("distill", "train"):
            wanted.update([initial_model(config, stage)])
    if "train" in options.stages and has_teacher(config, "train"):
        wanted["teacher.path"] = config.teacher.path
    for key, path in wanted.items():
        if path and _is_written(options, Path(path).absolute()):
            continue
        try:
            check_model_folder(path, key=key)
        except ConfigError as error:
            yield str(error)


def _is_written(options: JobOptions, path: Path) -> bool:
    """Whether a job of the chain leaves this model; with several seeds, whose folders differ, any stage of theirs."""
    stages = options.config.stages if options.seeds else options.stages
    folders = [options.run_dir / stage for stage in stages if stage in ("distill", "train")]
    return any(path == folder / "model" or path.parent == folder / "models" for folder in folders)
