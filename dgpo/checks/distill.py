"""Checks of `distill`."""

from __future__ import annotations

from dgpo.checks.files import check_collection, check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model, check_teacher
from dgpo.checks.prompts import check_tokens
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_betas, check_values
from dgpo.config.methods import has_teacher
from dgpo.config.schema import Config
from dgpo.config.stages import collection, initial_model
from dgpo.data.rows import row_id
from dgpo.errors import ConfigError
from dgpo.hardware.machine import check_start


def check_distill(config: Config) -> list[str]:
    """What the cold start needs: collected episodes, a student, a different teacher that shares its tokenizer."""
    notes: list[str] = []
    check_distill_settings(config)
    check_start(config, "distill")
    check_stage_folder(config, "distill")
    settings = config.distill
    key, student = initial_model(config, "distill")
    there = check_model(config, student, key=key, notes=notes)
    if has_teacher(config, "distill"):
        check_teacher(config, key, student if there else None, notes)
    episode = check_collection(config, notes)
    if episode and there:
        check_tokens(student, episode, key=key, source=str(collection(config)))
    if settings.demonstrations != "agent":
        rows = check_rows(config, config.data.collect_file, key="data.collect_file", notes=notes)
        if episode and rows and episode.episode_id.partition("#")[0] not in map(row_id, rows):
            raise ConfigError(
                f"data.collect_file={config.data.collect_file} is not what {collection(config)} was collected from: it "
                f"has no question {episode.episode_id!r}; name that file"
            )
    if settings.loss == "distillm":
        if there:
            check_lengths(config, key, student)
        check_retriever(config, [], notes)
    return notes


def check_distill_settings(config: Config) -> None:
    """What needs no file to be told."""
    settings, hardware = config.distill, config.hardware
    check_values(config, "hardware", "distill", *(["episode"] if settings.loss == "distillm" else []))
    if settings.demonstrations != "agent" and has_teacher(config, "distill"):
        raise ConfigError(
            f"distill.demonstrations={settings.demonstrations} with distill.loss={settings.loss}: the teacher never "
            "saw such a prompt, so only its tokens are learned; set distill.loss=seqkd"
        )
    check_betas("distill.adam_betas", settings.adam_betas)
    if settings.taid.t_start > settings.taid.t_end:
        raise ConfigError(
            f"distill.taid.t_start={settings.taid.t_start} is above distill.taid.t_end={settings.taid.t_end}: lower it"
        )
    num_gpus = hardware.num_gpus
    if settings.batch_size < num_gpus:
        raise ConfigError(f"distill.batch_size={settings.batch_size} on {num_gpus} GPUs leaves some without an episode")
    if settings.sharding == "full" and num_gpus == 1:
        raise ConfigError("distill.sharding=full needs more than one GPU: set distill.sharding=none")
    if settings.lora_rank and (settings.sharding == "full" or settings.loss == "distillm"):
        raise ConfigError(
            f"distill.lora_rank={settings.lora_rank} with distill.sharding={settings.sharding}, distill.loss="
            f"{settings.loss}: adapters are trained whole on every GPU, and by losses on the teacher's episodes; set "
            "distill.sharding=none and another loss, or distill.lora_rank=null"
        )
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
