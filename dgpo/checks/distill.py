"""Checks of `distill`."""

from __future__ import annotations

from dgpo.checks.files import check_collection, check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model, check_teacher
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_optimizer, check_values
from dgpo.config.schema import Config
from dgpo.config.stages import initial_model
from dgpo.errors import ConfigError
from dgpo.hardware.machine import check_start


def check_distill(config: Config) -> list[str]:
    """What the cold start needs: collected episodes, a student, a different teacher that shares its tokenizer."""
    notes: list[str] = []
    check_values(config, "hardware", "distill")
    check_start(config, "distill")
    check_stage_folder(config, "distill")
    settings = config.distill
    _check_distill_values(config)
    key, student = initial_model(config, "distill")
    there = check_model(config, student, key=key, notes=notes)
    if settings.loss != "seqkd":
        check_teacher(config, key, student if there else None, notes)
    check_collection(config, notes)
    if settings.demonstrations != "agent":
        if settings.loss != "seqkd":
            raise ConfigError(
                f"distill.demonstrations={settings.demonstrations} with distill.loss={settings.loss}: the teacher "
                "never saw such a prompt, so only its tokens are learned; set distill.loss=seqkd"
            )
        check_rows(config, config.data.collect_file, key="data.collect_file", notes=notes)
    if settings.loss == "distillm":
        check_values(config, "episode")
        if there:
            check_lengths(config, key, student)
        check_retriever(config, [], notes)
    return notes


def _check_distill_values(config: Config) -> None:
    settings, hardware = config.distill, config.hardware
    shares = {name: getattr(settings, name) for name in ("kl_ratio", "skew", "jsd_beta", "held_out_share")}
    shares |= {f"taid.{name}": getattr(settings.taid, name) for name in ("t_start", "t_end", "momentum")}
    shares["student_episodes.initial_threshold"] = settings.student_episodes.initial_threshold
    shares["min_learning_rate_share"] = settings.min_learning_rate_share
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"distill.{name}={value}: expected a share between 0 and 1")
    check_optimizer("distill", settings.adam_betas, settings.weight_decay)
    if settings.taid.t_start > settings.taid.t_end:
        raise ConfigError(
            f"distill.taid.t_start={settings.taid.t_start} is above distill.taid.t_end={settings.taid.t_end}: lower it"
        )
    counts = {name: getattr(settings, name) for name in ("max_steps", "micro_batch_size", "evaluate_every", "patience")}
    counts["student_episodes.buffer_size"] = settings.student_episodes.buffer_size
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"distill.{name}={value}: expected at least 1")
    num_gpus = hardware.num_nodes * hardware.gpus_per_node
    if settings.batch_size < num_gpus:
        raise ConfigError(f"distill.batch_size={settings.batch_size} on {num_gpus} GPUs leaves some without an episode")
    if settings.sharding == "full" and num_gpus == 1:
        raise ConfigError("distill.sharding=full needs more than one GPU: set distill.sharding=none")
    if hardware.dtype == "float16":
        raise ConfigError("hardware.dtype=float16 overflows in distillation: use bfloat16 or float32")
    if settings.loss == "distillm":
        if settings.held_out_share == 0:
            raise ConfigError("distill.loss=distillm adapts to the held-out loss: set distill.held_out_share above 0")
        buffer = settings.student_episodes.buffer_size
        if buffer < settings.batch_size:
            raise ConfigError(
                f"distill.student_episodes.buffer_size={buffer} holds no batch of {settings.batch_size}: raise it"
            )
