"""Checks of `collect`."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from dgpo.agent.search import is_address, open_direct, read_token
from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model
from dgpo.checks.prompts import PromptReader, check_prompts
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_values
from dgpo.config.schema import Config
from dgpo.config.stages import writer
from dgpo.data.lines import BadLines
from dgpo.data.questions import read_answered
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_engine
from dgpo.hardware.machine import check_start

SERVER_TIMEOUT_S = 10.0


def check_collect(config: Config) -> list[str]:
    """What collection needs: the teacher, questions, a retriever that knows their corpora, lengths, a free folder."""
    notes: list[str] = []
    check_collect_settings(config)
    check_start(config, "collect")
    check_stage_folder(config, "collect")
    key, model = writer(config)
    if config.collect.source == "transcripts":
        file = Path(config.data.collect_file or "")
        if not file.is_file():
            raise ConfigError(f"data.collect_file={config.data.collect_file}: name a jsonl file of transcripts")
        for _ in read_answered(file, BadLines(config.prepare.max_bad_lines)):
            pass
        if check_model(config, model, key=key, notes=notes):
            PromptReader(model, key=key, trust_remote_code=config.student.trust_remote_code).check_template()
        return notes
    rows = check_rows(config, config.data.collect_file, key="data.collect_file", notes=notes, named=True)
    if check_model(config, model, key=key, notes=notes):
        check_lengths(config, key, model)
        loaded_as = config.teacher if key == "teacher.path" else config.student
        check_prompts(
            config, model, rows, key=key, source=f"data.collect_file={config.data.collect_file}", loaded_as=loaded_as
        )
    if config.teacher.url and config.collect.source == "teacher":
        served_model(config)
    check_retriever(config, rows, notes)
    return notes


def check_collect_settings(config: Config) -> None:
    """What needs no file to be told."""
    check_values(config, "hardware", "episode", "collect")
    check_engine(config)
    if config.collect.samples_per_question > 1 and config.collect.temperature <= 0:
        raise ConfigError(
            f"collect.samples_per_question={config.collect.samples_per_question} with collect.temperature=0 samples "
            "the same episode again: set a temperature above 0"
        )


def served_model(config: Config) -> str:
    """The name that requests to `teacher.url` carry: the configured one, or the first that the server lists.

    Raises:
        ConfigError: no address, or a server that does not answer, or lists no model.
    """
    url = config.teacher.url or ""
    if not is_address(url):
        raise ConfigError(f"teacher.url={url}: expected an address such as http://127.0.0.1:8000/v1")
    if config.teacher.url_model:
        return config.teacher.url_model
    key = read_token(config.teacher.url_key_file, key="teacher.url_key_file")
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with open_direct(request, SERVER_TIMEOUT_S) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"teacher.url={url}: {address} names no model ({error}): start the server, or set teacher.url_model"
        ) from error
