"""Values that no stage can use: unknown choices, numbers out of range, an episode that cannot be played."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from dgpo.agent.modes import MODES
from dgpo.config.load import check_numbers
from dgpo.config.methods import ALGORITHMS, DISTILLATION_LOSSES, GATES, INIT_KL_FORMS, TEACHER_FORMS
from dgpo.config.schema import Config
from dgpo.config.stages import STAGES
from dgpo.errors import ConfigError

CHOICES: dict[str, Collection[str]] = {
    "hardware.platform": ("cuda", "cpu"),
    "hardware.dtype": ("bfloat16", "float32", "float16"),
    "hardware.offload": ("none", "idle", "full"),
    "hardware.attention": ("flash_attention_2", "sdpa", "eager"),
    "hardware.engine.dtype": ("bfloat16", "float32", "float16"),
    "collect.source": ("teacher", "oracle", "transcripts"),
    "train.algorithm": ALGORITHMS,
    "train.init_kl_form": INIT_KL_FORMS,
    "train.teacher_term.form": TEACHER_FORMS,
    "train.teacher_term.gate": GATES,
    "train.stability.action": ("warn", "stop", "rollback"),
    "distill.loss": DISTILLATION_LOSSES,
    "distill.sharding": ("none", "full"),
    "distill.demonstrations": tuple(MODES),
    "distill.student_episodes.watched": ("cross_entropy", "loss"),
    "test.compat": ("none", "upstream"),
    "ask.mode": tuple(MODES),
}


def check_values(config: Config, *sections: str) -> None:
    check_numbers(config)
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or len(set(config.stages)) < len(config.stages):
        raise ConfigError(f"stages={config.stages}: expected each of {', '.join(STAGES)} at most once")
    for key, choices in CHOICES.items():
        section, *rest = key.split(".")
        value: Any = getattr(config, section)
        for name in rest:
            value = getattr(value, name)
        if section in sections and value not in choices:
            raise ConfigError(f"{key}={value}: expected one of {', '.join(choices)}")
    if (config.hardware.platform, config.hardware.attention) == ("cpu", "flash_attention_2"):
        raise ConfigError("hardware.attention=flash_attention_2 with hardware.platform=cpu: it is of GPUs; set sdpa")
    if config.retriever.backend_options and not config.retriever.backend:
        raise ConfigError("retriever.backend_options are read with retriever.backend alone: set it, or leave them out")
    if "episode" in sections:
        _check_episode(config)


def check_betas(key: str, betas: list[float]) -> None:
    if len(betas) != 2:
        raise ConfigError(f"{key}={betas}: expected two numbers")


def _check_episode(config: Config) -> None:
    episode = config.episode
    if episode.min_turn_tokens > episode.max_turn_tokens:
        raise ConfigError(
            f"episode.min_turn_tokens={episode.min_turn_tokens} is above episode.max_turn_tokens="
            f"{episode.max_turn_tokens}: lower it"
        )
    search = episode.max_turn_tokens + episode.topk * episode.max_passage_tokens + episode.min_turn_tokens
    if search > episode.max_response_tokens:
        raise ConfigError(
            f"one turn, its {episode.topk} passages and the next turn take up to {search} tokens, more than "
            f"episode.max_response_tokens={episode.max_response_tokens}: raise it, or lower episode.max_turn_tokens, "
            "topk or max_passage_tokens"
        )


def nearest(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}expected some of {', '.join(choices)}"
