"""What each stage of an experiment starts from and leaves: the one place that knows the files between stages."""

from __future__ import annotations

import copy
from pathlib import Path

from dgpo.config.schema import Config

MODEL_STEPS = "models/steps.json"  # where a stage leaves several models: name -> step
STAGES = ("collect", "distill", "train", "test")
# What processes on other nodes read, each from a working directory of its own.
SHARED_FILES = [
    "run_dir",
    "student.path",
    "teacher.path",
    "teacher.init",
    "data.collect_file",
    "data.train_file",
    "data.validation_file",
    "distill.init",
    "distill.episodes",
    "train.init",
    "retriever.token_file",
]


def collection(config: Config) -> Path:
    """The folder of the collected teacher episodes that distillation reads."""
    return Path(config.distill.episodes or Path(config.run_dir) / "collect")


def stage_model(config: Config, stage: str) -> Path:
    """The Hugging Face folder that `distill` or `train` writes."""
    return Path(config.run_dir) / stage / "model"


def step_model(step: int) -> str:
    """The name, below a stage's `models`, of the checkpoint of a kept step."""
    return f"step_{step}"


def reported_model(config: Config, stage: str) -> Path:
    """What a later stage starts from: of RL the last of `train.keep_steps` that it reaches, else its last step's."""
    kept = [step for step in config.train.keep_steps if step <= config.train.num_steps]
    if stage == "train" and kept:
        return Path(config.run_dir) / "train" / "models" / step_model(max(kept))
    return stage_model(config, stage)


def initial_model(config: Config, stage: str) -> tuple[str, str]:
    """What `distill` or `train` starts from.

    Returns:
        (config key to name in messages, path): the stage's own `init`; else the model of the training stage before it
        in `config.stages`; else `student.path`, "" where that is not set either.
    """
    own = getattr(config, stage).init
    if own:
        return f"{stage}.init", own
    before = config.stages[: config.stages.index(stage)] if stage in config.stages else []
    trained = [name for name in before if name in ("distill", "train")]
    if trained:
        return f"{stage}.init", str(reported_model(config, trained[-1]))
    return "student.path", config.student.path or ""


def is_planned(config: Config, path: str | Path) -> bool:
    """Whether an earlier stage of this experiment will write `path`, so that a dry run does not miss it yet."""
    trained = [stage for stage in config.stages if stage in ("distill", "train")]
    return any(Path(path) in (stage_model(config, stage), reported_model(config, stage)) for stage in trained)


def absolute(path: str) -> str:
    """The same place from any working directory. What is not there, such as a hub name, stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def with_absolute_paths(config: Config) -> Config:
    """A copy for processes that start elsewhere: relative paths are resolved once, where the user gave them."""
    config = copy.deepcopy(config)
    for key in SHARED_FILES:
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        if getattr(owner, name):
            setattr(owner, name, absolute(getattr(owner, name)))
    config.run_dir = str(Path(config.run_dir).absolute())
    return config


def writer(config: Config) -> tuple[str, str]:
    """(config key, model) in whose tokens demonstrations are written.

    The student's where nothing else is known: of scripts and texts, and of a teacher behind a server of texts.
    """
    teacher = config.teacher
    as_text = config.collect.source != "teacher" or (teacher.url and not teacher.url_ids and config.student.path)
    return ("student.path", config.student.path or "") if as_text else ("teacher.path", teacher.path or "")
