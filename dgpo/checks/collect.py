"""Checks of `collect`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

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
    if config.collect.source == "transcripts":
        if not Path(config.data.collect_file or "").is_file():
            raise ConfigError(f"data.collect_file={config.data.collect_file}: name a jsonl file of transcripts")
        check_model(config, writer(config)[1], key="student.path", notes=notes)
        return notes
    rows = check_rows(config.data.collect_file, key="data.collect_file")
    key, model = writer(config)
    if check_model(config, model, key=key, notes=notes):
        check_lengths(config, key, model)
    if config.teacher.url and config.collect.source == "teacher":
        _check_server(config.teacher.url)
    if config.collect.samples_per_question > 1 and config.collect.temperature <= 0:
        raise ConfigError(
            f"collect.samples_per_question={config.collect.samples_per_question} with collect.temperature=0 samples "
            "the same episode again: set a temperature above 0"
        )
    check_retriever(config, rows)
    return notes


def _check_server(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"teacher.url={url}: expected an address such as http://127.0.0.1:8000/v1")
