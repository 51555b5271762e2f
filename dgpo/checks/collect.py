"""Checks of `collect`."""

from __future__ import annotations

from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_values
from dgpo.config.load import ConfigError
from dgpo.config.schema import Config
from dgpo.hardware.checks import check_engine
from dgpo.hardware.machine import check_start


def check_collect(config: Config) -> list[str]:
    """What collection needs: the teacher, questions, a retriever that knows their corpora, lengths, a free folder."""
    notes: list[str] = []
    check_values(config, "hardware", "episode", "collect")
    check_start(config, "collect")
    check_engine(config)
    check_stage_folder(config, "collect")
    rows = check_rows(config, config.data.collect_file, key="data.collect_file", notes=notes, named=True)
    if check_model(config, config.teacher.path, key="teacher.path", notes=notes):
        check_lengths(config, "teacher.path", config.teacher.path)
    if config.collect.samples_per_question > 1 and config.collect.temperature <= 0:
        raise ConfigError(
            f"collect.samples_per_question={config.collect.samples_per_question} with collect.temperature=0 samples "
            "the same episode again: set a temperature above 0"
        )
    check_retriever(config, rows, notes)
    return notes
