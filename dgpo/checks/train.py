"""Checks of `train`, before Ray starts."""

from __future__ import annotations

from omegaconf import OmegaConf

from dgpo.agent.plugins import load_reward
from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model, check_teacher
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_optimizer, check_values
from dgpo.config.methods import rl_conflict
from dgpo.config.schema import Config
from dgpo.config.stages import initial_model
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_engine, check_training
from dgpo.hardware.machine import check_start

REPLACED = {  # raw key of veRL -> what to do
    "algorithm.adv_estimator": "set train.algorithm, or add an entry to ALGORITHMS (docs/extending.md)",
    "algorithm.use_pf_ppo": "add an entry to ALGORITHMS (docs/extending.md)",
    "trainer.total_epochs": "set train.num_steps",
    "trainer.v1.trainer_mode": "the synchronous trainer is the only one",
    "trainer.v1.sync.parameter_sync_step": "the engine gets new weights after every step",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": "episodes are those of dgpo/rl/agent_loop.py",
}


def check_train(config: Config) -> list[str]:
    """What RL needs, before Ray starts: models that match, questions, batches that divide, lengths, a retriever."""
    notes: list[str] = []
    check_values(config, "hardware", "episode", "train")
    check_start(config, "train")
    check_stage_folder(config, "train")
    _check_stability(config)
    _check_updates(config)
    if config.train.reward:
        load_reward(config.train.reward)
    _check_raw_keys(config)
    conflict = rl_conflict(config)
    if conflict:
        raise ConfigError(conflict)
    train = config.train
    rows = check_rows(config, config.data.train_file, key="data.train_file", notes=notes)
    if rows and len(rows) < train.batch_size:
        raise ConfigError(
            f"data.train_file={config.data.train_file} has {len(rows)} questions, fewer than "
            f"train.batch_size={train.batch_size}: lower train.batch_size or add questions"
        )
    if config.data.validation_file:
        rows += check_rows(config, config.data.validation_file, key="data.validation_file", notes=notes)
    key, student = initial_model(config, "train")
    there = check_model(config, student, key=key, notes=notes)
    if there:
        check_lengths(config, key, student)
    if train.teacher_term.gate != "none":
        check_teacher(config, key, student if there else None, notes)
    check_engine(config)
    check_training(config)
    check_retriever(config, rows, notes)
    return notes


def _check_raw_keys(config: Config) -> None:
    """Keys of veRL that its own loop would read, and ours does not."""
    verl = OmegaConf.create({})
    for key, value in config.hardware.verl.items():
        OmegaConf.update(verl, key, value, force_add=True)
    for key, instead in REPLACED.items():
        if OmegaConf.select(verl, key) is not None:
            raise ConfigError(f"hardware.verl.{key} is read by nothing here: {instead}")


def _check_updates(config: Config) -> None:
    train = config.train
    check_optimizer("train", train.adam_betas, train.weight_decay)
    for name in ("actor_warmup_steps", "critic_warmup_steps"):
        if getattr(train, name) < 0:
            raise ConfigError(f"train.{name}={getattr(train, name)}: expected 0 or more")
    for step in train.keep_steps:
        if step < 1 or (step < train.num_steps and (train.save_every < 1 or step % train.save_every)):
            raise ConfigError(
                f"train.keep_steps={train.keep_steps}: step {step} is not saved with train.save_every="
                f"{train.save_every}: choose multiples of it"
            )
    if train.dual_clip is not None and train.dual_clip <= 1:
        raise ConfigError(f"train.dual_clip={train.dual_clip}: expected more than 1, or null for no cap")


def _check_stability(config: Config) -> None:
    stability = config.train.stability
    for name in ("patience", "window"):
        if getattr(stability, name) < 1:
            raise ConfigError(f"train.stability.{name}={getattr(stability, name)}: expected at least 1")
    for name in ("max_entropy_ratio", "max_kl_ratio", "max_grad_norm_ratio"):
        if getattr(stability, name) <= 1:
            raise ConfigError(
                f"train.stability.{name}={getattr(stability, name)}: expected more than 1, times a healthy value"
            )
    if not 0 < stability.rollback_learning_rate_scale <= 1:
        raise ConfigError(
            f"train.stability.rollback_learning_rate_scale={stability.rollback_learning_rate_scale}: expected a share "
            "above 0 and at most 1"
        )
