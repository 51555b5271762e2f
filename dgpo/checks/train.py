"""Checks of `train`, before Ray starts."""

from __future__ import annotations

import importlib.util
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from dgpo.agent.plugins import load_reward
from dgpo.checks.files import check_rows, check_stage_folder
from dgpo.checks.models import check_lengths, check_model, check_teacher
from dgpo.checks.prompts import check_prompts
from dgpo.checks.search import check_retriever
from dgpo.checks.values import check_betas, check_values, nearest
from dgpo.config.methods import has_teacher, rl_conflict
from dgpo.config.schema import Config
from dgpo.config.stages import initial_model
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_engine, check_training
from dgpo.hardware.machine import check_start

LOGGERS = {  # backend of veRL's `Tracking` -> the package it needs
    "console": None,
    "file": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "clearml": "clearml",
    "vemlp_wandb": "volcengine_ml_platform",
}
REPLACED = {  # raw key of veRL -> what to do
    "algorithm.adv_estimator": "set train.algorithm, or add an entry to ALGORITHMS (docs/extending.md)",
    "algorithm.use_pf_ppo": "add an entry to ALGORITHMS (docs/extending.md)",
    "trainer.total_epochs": "set train.num_steps",
    "trainer.total_training_steps": "set train.num_steps",
    "trainer.logger": "set train.loggers",
    "data.train_batch_size": "set train.batch_size",
    "actor_rollout_ref.rollout.n": "set train.samples_per_question",
    "trainer.v1.trainer_mode": "the synchronous trainer is the only one",
    "actor_rollout_ref.model.lora_rank": "RL trains all weights, and the critic of PPO has no adapters; "
    "distill.lora_rank is the cold start's (docs/hardware.md)",
    "trainer.v1.sync.parameter_sync_step": "the engine gets new weights after every step",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class": "episodes are those of dgpo/rl/agent_loop.py",
}


def check_train(config: Config) -> list[str]:
    """What RL needs, before Ray starts: models that match, questions, batches that divide, lengths, a retriever."""
    notes: list[str] = []
    check_train_settings(config)
    check_loggers(config)
    check_start(config, "train")
    check_stage_folder(config, "train")
    train = config.train
    rows = check_rows(config, config.data.train_file, key="data.train_file", notes=notes)
    if rows and len(rows) < train.batch_size:
        raise ConfigError(
            f"data.train_file={config.data.train_file} has {len(rows)} questions, fewer than "
            f"train.batch_size={train.batch_size}: lower train.batch_size or add questions"
        )
    validation = []
    if config.data.validation_file:
        validation = check_rows(config, config.data.validation_file, key="data.validation_file", notes=notes)
    key, student = initial_model(config, "train")
    there = check_model(config, student, key=key, notes=notes)
    if there:
        check_lengths(config, key, student)
        for name, found in (("train_file", rows), ("validation_file", validation)):
            source = f"data.{name}={getattr(config.data, name)}"
            check_prompts(config, student, found, key=key, source=source, loaded_as=config.student)
    if has_teacher(config, "train"):
        if not there and student != config.student.path and config.student.path:
            # What an earlier stage will write keeps the tokenizer of what it starts from.
            key, student = "student.path", config.student.path
            there = check_model(config, student, key=key, notes=notes)
        check_teacher(config, key, student if there else None, notes)
    check_retriever(config, [*rows, *validation], notes)
    return notes


def check_train_settings(config: Config) -> None:
    """What needs no file to be told."""
    check_values(config, "hardware", "episode", "train")
    _check_updates(config)
    if config.train.reward:
        load_reward(config.train.reward)
    for logger in config.train.loggers:
        if logger not in LOGGERS:
            raise ConfigError(f"train.loggers: unknown logger {logger!r}: {nearest(logger, LOGGERS)}")
    _check_raw_keys(config)
    conflict = rl_conflict(config)
    if conflict:
        raise ConfigError(conflict)
    check_engine(config)
    check_training(config)


def check_loggers(config: Config) -> None:
    """That the packages of the loggers are installed where the command runs, and what they need to log in."""
    loggers = config.train.loggers
    for logger in loggers:
        module = LOGGERS[logger]
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(f"train.loggers={list(loggers)}: {module} is not installed: install it, or leave it out")
    if "wandb" in loggers and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        _check_wandb_login()


def _check_wandb_login() -> None:
    """Without a key it would ask for one on a terminal that a trainer does not have."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        logins = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        logins = {}
    if not os.environ.get("WANDB_API_KEY") and host not in logins:
        raise ConfigError(
            f"train.loggers has wandb, and there is no key for {host}: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )


def _check_raw_keys(config: Config) -> None:
    """Keys that veRL does not have, and those that its own loop would read, and ours does not."""
    verl = OmegaConf.create({})
    for key, value in config.hardware.verl.items():
        OmegaConf.update(verl, key, value, force_add=True)
    for key, instead in REPLACED.items():
        if OmegaConf.select(verl, key) is not None:
            raise ConfigError(f"hardware.verl.{key} cannot be set: {instead}")
    if len(verl):
        _check_known(verl, _verl_tree(), "")


def _verl_tree() -> DictConfig:
    """veRL's own configuration, read without importing veRL."""
    found = importlib.util.find_spec("verl")
    folder = Path((found.submodule_search_locations or [""])[0] if found else "") / "trainer" / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose("ppo_trainer")


def _check_known(given: DictConfig, known: DictConfig, prefix: str) -> None:
    """What veRL leaves empty takes any key: arguments that it passes on."""
    for name in map(str, given):
        if name not in map(str, known):  # `in known` says no of what veRL leaves to be set
            raise ConfigError(f"hardware.verl.{prefix}{name}: veRL has no such key: {nearest(name, map(str, known))}")
        inside, there = given._get_node(name), known._get_node(name)
        if isinstance(there, DictConfig) and len(there):
            if not isinstance(inside, DictConfig):
                raise ConfigError(f"hardware.verl.{prefix}{name}={given[name]}: veRL has a section of settings there")
            _check_known(inside, there, f"{prefix}{name}.")
        elif (kind := _kind(known, name)) and given[name] is not None and not isinstance(given[name], kind):
            raise ConfigError(
                f"hardware.verl.{prefix}{name}={given[name]}: veRL has {known[name]} there; expected the same kind"
            )


def _kind(known: DictConfig, name: str) -> type | tuple[type, ...] | None:
    """What a value may be by veRL's own; None where that leaves it open, as a null and a text do."""
    value = None if OmegaConf.is_missing(known, name) or OmegaConf.is_interpolation(known, name) else known[name]
    if isinstance(value, bool):
        return bool
    if isinstance(value, int | float):
        return (int, float)
    return ListConfig if isinstance(value, ListConfig) else None


def _check_updates(config: Config) -> None:
    train = config.train
    check_betas("train.adam_betas", train.adam_betas)
    for step in train.keep_steps:
        if step < train.num_steps and (train.save_every < 1 or step % train.save_every):
            raise ConfigError(
                f"train.keep_steps={train.keep_steps}: step {step} is not saved with train.save_every="
                f"{train.save_every}: choose multiples of it"
            )
