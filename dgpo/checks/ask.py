"""Checks of `ask`."""

from __future__ import annotations

from dgpo.checks.models import check_lengths, check_model
from dgpo.checks.prompts import PromptReader
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_values
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_engine
from dgpo.hardware.machine import check_start


def check_ask(config: Config) -> None:
    """What `ask` needs: a checkpoint, room for an episode, a prompt with a place for the question, a retriever."""
    check_values(config, "hardware", "episode", "ask")
    check_start(config, "ask")
    check_engine(config)
    ask = config.ask
    if not ask.model:
        raise ConfigError(
            "ask.model is not set: name a checkpoint, e.g. ask.model=runs/dgpo/train/model, or add world=tiny to use "
            "the latest quickstart's"
        )
    check_model(config, ask.model, key="ask.model", notes=[])
    check_lengths(config, "ask.model", ask.model)
    PromptReader(ask.model, key="ask.model", trust_remote_code=config.student.trust_remote_code).check_template()
    if ask.prompt is not None and "{question}" not in ask.prompt:
        raise ConfigError(f"ask.prompt={ask.prompt!r} has no place for the question: add {{question}} to it")
    check_retriever(config, [{"extra_info": {"corpus": ask.corpus}}], [])
