"""A checkpoint plays planned episodes: where collection, DistiLLM, `test`, `arcap` and `ask` make their policy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from dgpo.agent.episode import Policy
from dgpo.agent.protocol import STOP_STRINGS
from dgpo.agent.trajectory import Trajectory
from dgpo.config.schema import Config
from dgpo.config.stages import absolute
from dgpo.engines.episode_runner import PlannedEpisode, play_episodes
from dgpo.engines.policy_pool import PolicyPool, num_engines
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.errors import ConfigError, one_line
from dgpo.runs.identity import model_identity
from dgpo.runs.stopping import cancel_on_signal


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer that was saved beside a checkpoint.

    Raises:
        ConfigError: there is none, or it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        reason = one_line(error)[:200]
        raise ConfigError(
            f"{path} has no tokenizer that loads ({reason}): save the model's tokenizer beside its weights"
        ) from error


def make_policy(
    config: Config,
    model: str,
    *,
    temperature: float,
    trust_remote_code: bool,
    log_probs: bool = True,
    replaceable_weights: bool = False,
) -> VllmPolicy:
    """The engine of one checkpoint, not yet started, with room for the longest episode that `config` allows."""
    return VllmPolicy(
        model,
        hardware=config.hardware,
        max_model_len=config.episode.max_tokens,
        temperature=temperature,
        seed=config.seed,
        trust_remote_code=trust_remote_code,
        log_probs=log_probs,
        replaceable_weights=replaceable_weights,
    )


def play_model(
    config: Config,
    planned: Sequence[PlannedEpisode],
    *,
    model: str,
    tokenizer: Any,
    temperature: float,
    trust_remote_code: bool,
    path: Path,
    name: str,
    stop: Sequence[str] = STOP_STRINGS,
    settings: Mapping[str, Any],
    log_probs: bool = False,
) -> list[Trajectory]:
    """Starts an engine with `model`, plays every episode that `path`'s partial file lacks, and ends the engine.

    With more GPUs than one engine takes, as many engines as they hold play side by side, over Ray, on every node.

    Args:
        log_probs: whether the trajectories hold them.
        settings: of `dgpo.runs.settings.episode_settings`.
        path, name, stop: of `dgpo.engines.episode_runner.play_episodes`; what it raises is raised here.

    Raises:
        ConfigError: the model is no longer the one that the settings name.
    """

    place = absolute(model)

    def one() -> VllmPolicy:
        return make_policy(
            config, place, temperature=temperature, trust_remote_code=trust_remote_code, log_probs=log_probs
        )

    size = num_engines(config.hardware)
    trajectories = play_policy(
        config,
        planned,
        policy=PolicyPool(one, hardware=config.hardware, size=size) if size > 1 else one(),
        tokenizer=tokenizer,
        path=path,
        settings=settings,
        stop=stop,
        name=name,
        concurrency=size * config.hardware.engine.concurrency,
    )
    if model_identity(model) != settings["weights"]:
        raise ConfigError(f"{model} was changed while its episodes were played: repeat the command with resume=true")
    return trajectories


def play_policy(
    config: Config,
    planned: Sequence[PlannedEpisode],
    *,
    policy: AbstractAsyncContextManager[Policy],
    tokenizer: Any,
    concurrency: int,
    **options: Any,
) -> list[Trajectory]:
    """Opens the policy and plays every planned episode that its partial file lacks.

    Args:
        concurrency: episodes in flight.
        options: of `dgpo.engines.episode_runner.play_episodes`; what it raises is raised here.
    """

    async def play() -> list[Trajectory]:
        async with policy as opened:
            with cancel_on_signal():  # after Ray's start, which sets a handler of its own
                return await play_episodes(
                    planned, policy=opened, tokenizer=tokenizer, config=config, concurrency=concurrency, **options
                )

    return asyncio.run(play())
