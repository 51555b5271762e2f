"""Values that no stage can use: unknown choices, numbers that must be positive, an episode that cannot be played."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from dgpo.agent.modes import MODES
from dgpo.config.methods import ALGORITHMS, GATES, INIT_KL_FORMS, TEACHER_FORMS
from dgpo.config.schema import Config
from dgpo.config.stages import STAGES
from dgpo.errors import ConfigError

CHOICES: dict[str, Collection[str]] = {
    "hardware.platform": ("cuda", "cpu"),
    "hardware.dtype": ("bfloat16", "float32", "float16"),
    "hardware.offload": ("none", "idle", "full"),
    "collect.source": ("teacher", "oracle", "transcripts"),
    "train.algorithm": ALGORITHMS,
    "train.init_kl_form": INIT_KL_FORMS,
    "train.teacher_term.form": TEACHER_FORMS,
    "train.teacher_term.gate": GATES,
    "train.stability.action": ("warn", "stop", "rollback"),
    "distill.loss": (
        "kd",
        "seqkd",
        "distillm",
        "taid",
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
    ),
    "distill.sharding": ("none", "full"),
    "distill.demonstrations": tuple(MODES),
    "distill.student_episodes.watched": ("cross_entropy", "loss"),
    "test.compat": ("none", "upstream"),
}
POSITIVE = {  # section -> the keys whose values must be above 0
    "hardware": "num_nodes gpus_per_node micro_batch_size ulysses_size weight_bucket_mb num_agent_workers "
    "num_storage_units",
    "episode": "max_turns max_turn_tokens max_prompt_tokens max_response_tokens min_turn_tokens topk "
    "max_passage_tokens max_query_chars",
    "collect": "samples_per_question",
    "distill": "epochs batch_size learning_rate chunk_tokens evaluations_per_epoch",
    "train": "num_steps batch_size mini_batch_size samples_per_question temperature actor_learning_rate "
    "critic_learning_rate",
    "test": "samples upstream_batch_size",
    "retriever": "timeout_s max_concurrency max_queries_per_request",
}


def check_values(config: Config, *sections: str) -> None:
    if "episode" in sections:  # episodes search
        sections = (*sections, "retriever")
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
    for section in sections:
        for name in POSITIVE[section].split():
            value = getattr(getattr(config, section), name)
            if value <= 0:
                raise ConfigError(f"{section}.{name}={value}: expected more than 0")
    if "train" in sections and (within := config.train.reuse_log_probs_within) is not None and within <= 0:
        raise ConfigError(
            f"train.reuse_log_probs_within={within}: expected more than 0 nats, or null to compute the log-probs always"
        )
    if "episode" in sections:
        _check_episode(config)


def check_optimizer(section: str, betas: list[float], weight_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"{section}.adam_betas={betas}: expected two numbers from 0 to below 1")
    if weight_decay < 0:
        raise ConfigError(f"{section}.weight_decay={weight_decay}: expected 0 or more")


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
