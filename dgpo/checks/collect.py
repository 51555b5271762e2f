"""Checks of `collect`."""

from __future__ import annotations

from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_values
from dgpo.config.load import ConfigError
from dgpo.config.schema import Config
from dgpo.config.stages import writer
from dgpo.hardware.checks import check_engine


def check_collect(config: Config) -> list[str]:
    """What collection needs: the teacher, questions, a retriever that knows their corpora, lengths, a free folder."""
    notes: list[str] = []
    check_values(config, "hardware", "episode", "collect")
    check_engine(config)
    check_stage_folder(config, "collect")
    rows = check_rows(config.data.collect_file, key="data.collect_file")
    key = "teacher.path" if config.collect.source == "teacher" else "student.path"
    if check_model(config, writer(config), key=key, notes=notes):
        check_lengths(config, key, writer(config))
    if config.collect.samples_per_question > 1 and config.collect.temperature <= 0:
        raise ConfigError(
            f"collect.samples_per_question={config.collect.samples_per_question} with collect.temperature=0 samples "
            "the same episode again: set a temperature above 0"
        )
    check_retriever(config, rows)
    return notes
