"""What the settings of stages say by themselves: for commands that start stages, and jobs that wait in a queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dgpo.agent.plugins import check_search
from dgpo.agent.search import split_urls
from dgpo.checks.collect import check_collect_settings
from dgpo.checks.distill import check_distill_settings
from dgpo.checks.files import check_rows
from dgpo.checks.test import check_test_settings
from dgpo.checks.train import check_loggers, check_train_settings
from dgpo.checks.values import check_values
from dgpo.config.model_files import check_model_folder
from dgpo.config.schema import Config
from dgpo.errors import ConfigError

CHECKS: dict[str, Callable[[Config], None]] = {
    "collect": check_collect_settings,
    "distill": check_distill_settings,
    "train": check_train_settings,
    "test": check_test_settings,
    "arcap": check_test_settings,
}


def check_settings(config: Config, stages: Sequence[str]) -> None:
    """Raises `ConfigError` for what would stop one of the stages, hours later perhaps, whatever files it finds."""
    check_values(config)
    for stage in stages:
        CHECKS[stage](config)
    if config.retriever.backend:
        check_search(config.retriever)
    else:
        split_urls(config.retriever.url)


def check_pipeline(config: Config) -> None:
    """The same of a whole experiment that is tested in the end: it must leave a model, and has no test of its own."""
    if "test" in config.stages or not {"distill", "train"} & set(config.stages) or config.stages[-1] == "collect":
        raise ConfigError(
            f"stages={config.stages}: expected distill or train, or both, in the end; the test follows by itself"
        )
    check_settings(config, [*config.stages, "test"])
    if "train" in config.stages:
        check_loggers(config)


def check_named(config: Config, folder: Path) -> None:
    """Raises `ConfigError` for models and questions that are named and not there, but for those below `folder`."""
    data, tested = config.data, config.test.models
    models = {
        "student.path": config.student.path,
        "teacher.path": config.teacher.path,
        "distill.init": config.distill.init,
        "train.init": config.train.init,
        **{f"test.models.{name}": path for name, path in tested.items()},
    }
    files = {
        "data.collect_file": data.collect_file,
        "data.train_file": data.train_file,
        "data.validation_file": data.validation_file,
        **{f"data.test_files.{name}": file for name, file in data.test_files.items()},
    }
    for key, path in models.items():
        if path and not Path(path).absolute().is_relative_to(folder.absolute()):
            check_model_folder(path, key=key)
    for key, path in files.items():
        if path and not Path(path).absolute().is_relative_to(folder.absolute()):
            check_rows(config, path, key=key, notes=[])
