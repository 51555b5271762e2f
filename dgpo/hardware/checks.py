"""Parallel sizes and memory shares that fit together, before Ray starts."""

from __future__ import annotations

import importlib.util

from dgpo.config.methods import has_exact_teacher
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.hardware.known_gpus import KNOWN_GPUS


def check_engine(config: Config) -> None:
    """What every stage with an engine needs of `hardware.engine`."""
    hardware, engine = config.hardware, config.hardware.engine
    if hardware.gpu is not None and hardware.gpu not in KNOWN_GPUS:
        raise ConfigError(f"hardware.gpu={hardware.gpu}: expected one of {', '.join(KNOWN_GPUS)}, or null")
    check_divides(
        "hardware.gpus_per_node",
        hardware.gpus_per_node,
        "hardware.engine.tensor_parallel_size",
        engine.tensor_parallel_size,
    )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise ConfigError(
            f"hardware.engine.max_num_batched_tokens={engine.max_num_batched_tokens} is below "
            f"hardware.engine.max_num_seqs={engine.max_num_seqs}: raise the one or lower the other"
        )
    if engine.worker_extension and not _is_found(engine.worker_extension.rpartition(".")[0]):
        raise ConfigError(
            f"hardware.engine.worker_extension={engine.worker_extension}: expected package.module.Class, of a module "
            "that Python finds"
        )


def _is_found(module: str) -> bool:
    """Whether there is such a module; ours, which import engines, are not touched."""
    try:
        return module.startswith("dgpo.") or (bool(module) and importlib.util.find_spec(module) is not None)
    except (ImportError, ValueError):
        return False


def check_training(config: Config) -> None:
    """What RL needs: batches that divide over the GPUs, and sizes that go together."""
    train, hardware = config.train, config.hardware
    num_gpus = hardware.num_gpus
    check_divides("GPUs", num_gpus, "hardware.ulysses_size", hardware.ulysses_size)
    if hardware.fsdp_size and hardware.fsdp_size < num_gpus:
        check_divides("GPUs", num_gpus, "hardware.fsdp_size", hardware.fsdp_size)
    of_a_step, episodes = train.batch_size * train.samples_per_question, train.mini_batch_size
    name = "train.batch_size" if train.samples_per_question == 1 else "train.batch_size x samples_per_question"
    check_divides(name, of_a_step, "train.mini_batch_size", episodes)
    check_divides(name, of_a_step, "GPUs", num_gpus)
    check_divides("train.mini_batch_size", episodes, "GPUs", num_gpus)
    if train.algorithm == "ppo":  # veRL cuts the critic's updates by whole questions
        check_divides("train.mini_batch_size", episodes, "train.samples_per_question", train.samples_per_question)
    if hardware.max_tokens_per_gpu is None:
        check_divides(
            "episodes of a mini-batch per GPU",
            episodes // num_gpus,
            "hardware.micro_batch_size",
            hardware.micro_batch_size,
        )
    else:
        _check_longest_episode(config, hardware.max_tokens_per_gpu)
    check_attention(config)
    if hardware.ulysses_size > 1:
        _check_ulysses(config)


def check_attention(config: Config) -> None:
    """Micro-batches by tokens hold packed episodes: padding has no bound.

    Packed ones are kept apart by flash attention, and on CPUs by sdpa, at a cost that grows with its square.
    """
    hardware = config.hardware
    if hardware.max_tokens_per_gpu and not hardware.remove_padding:
        raise ConfigError(
            f"hardware.max_tokens_per_gpu={hardware.max_tokens_per_gpu} counts packed tokens: set "
            "hardware.remove_padding=true, or hardware.max_tokens_per_gpu=null and hardware.micro_batch_size to the "
            "episodes per GPU and forward"
        )
    packing = ("flash_attention_2", "sdpa") if hardware.platform == "cpu" else ("flash_attention_2",)
    if hardware.remove_padding and hardware.attention not in packing:
        raise ConfigError(
            f"hardware.attention={hardware.attention} with packed episodes (hardware.remove_padding=true, "
            f"hardware.max_tokens_per_gpu={hardware.max_tokens_per_gpu}): set hardware.remove_padding=false "
            "hardware.max_tokens_per_gpu=null, and hardware.micro_batch_size to the episodes per GPU and forward"
        )


def _check_longest_episode(config: Config, max_tokens: int) -> None:
    longest = config.episode.max_tokens
    if max_tokens * config.hardware.ulysses_size < longest:
        raise ConfigError(
            f"hardware.max_tokens_per_gpu={max_tokens} holds no episode of {longest} tokens (episode.max_prompt_tokens "
            f"+ max_response_tokens): set it to {-(-longest // config.hardware.ulysses_size)} or more"
        )


def _check_ulysses(config: Config) -> None:
    """Sequences cut over several GPUs: only packed ones, and not where the loss reads the teacher of whole episodes."""
    size = config.hardware.ulysses_size
    if not config.hardware.remove_padding:
        raise ConfigError(f"hardware.ulysses_size={size} cuts packed sequences: set hardware.remove_padding=true")
    if has_exact_teacher(config):
        raise ConfigError(
            f"hardware.ulysses_size={size} with train.teacher_term.form=exact: each GPU has a part of a sequence, "
            "and the term reads the teacher of whole episodes; set hardware.ulysses_size=1"
        )


def check_heads(config: Config, heads: int) -> None:
    """That attention heads divide over the GPUs that share a sequence, or a replica."""
    for key, size in (
        ("hardware.ulysses_size", config.hardware.ulysses_size),
        ("hardware.engine.tensor_parallel_size", config.hardware.engine.tensor_parallel_size),
    ):
        check_divides("attention heads", heads, key, size)


def check_divides(name: str, value: int, divisor_name: str, divisor: int | None) -> None:
    if divisor and value % divisor:
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}: change one of them")
