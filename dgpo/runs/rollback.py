"""Going back to a sound checkpoint: what is set aside, and what the run goes on with.

`events.jsonl` in the stage's folder tells of every rollback. How many there are decides the sampling seed and the
learning rate, so that a killed run resumes with what it had.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgpo.agent.seeds import derive_seed
from dgpo.config.schema import Config
from dgpo.errors import CollapseError
from dgpo.files import atomic_write_text, read_jsonl, write_jsonl
from dgpo.runs.checkpoints import checkpoint_steps

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
CHECKPOINT = "global_step_"  # veRL's name of a checkpoint, before the step
TRACKER = "latest_checkpointed_iteration.txt"  # veRL's: the step of the newest one, for its tools
SET_ASIDE = "rolled_back"  # folder of numbered folders
LAST_GOOD = "last_good"


def num_rollbacks(folder: Path) -> int:
    """Rollbacks that the run in this stage folder has made."""
    return sum(event["event"] == "rollback" for event in read_events(folder))


def read_events(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / EVENTS, growing=True)


def after_rollbacks(config: Config, folder: Path) -> Config:
    """The configuration to go on with: another seed and a lower actor learning rate for each rollback so far."""
    count = num_rollbacks(folder)
    if not count:
        return config
    scale = config.train.stability.rollback_learning_rate_scale**count
    train = replace(config.train, actor_learning_rate=config.train.actor_learning_rate * scale)
    return replace(config, train=train, seed=derive_seed(config.seed, "rollback", count), resume=True)


def last_good_step(folder: Path, first_step: int) -> int:
    """The last checkpoint from before the trouble; 0, the initial model, where none is kept.

    Episodes of step t are played by the weights after step t - 1. So if step t is the first with a sign of trouble, the
    weights after step t - 2 are the last that are known to have played sound episodes.
    """
    steps = [step for step in _checkpoints(folder) if step <= first_step - 2]
    return max(steps, default=0)


def roll_back(folder: Path, error: CollapseError) -> dict[str, Any]:
    """Makes the last good checkpoint the latest one. Later checkpoints and all metrics so far are kept, set aside.

    Can be killed between any two of its acts: the run then resumes from the good checkpoint, or meets the same trouble
    again.

    Returns:
        The event, as written to `events.jsonl`.
    """
    good = last_good_step(folder, error.first_step)
    checkpoints = folder / "checkpoints"
    aside = folder / SET_ASIDE / str(num_rollbacks(folder) + 1)
    aside.mkdir(parents=True, exist_ok=True)
    if good:
        atomic_write_text(checkpoints / TRACKER, str(good))
    else:
        (checkpoints / TRACKER).unlink(missing_ok=True)
    later = [step for step in _checkpoints(folder) if step > good]
    for step in reversed(later):  # the newest is what a run resumes from
        name = f"{CHECKPOINT}{step}"
        shutil.rmtree(aside / name, ignore_errors=True)
        (checkpoints / name).rename(aside / name)
    if (folder / METRICS).exists():
        shutil.copy(folder / METRICS, aside / METRICS)
    event = {
        "event": "rollback",
        "rollback": num_rollbacks(folder) + 1,
        "to_step": good,
        "first_sign_at_step": error.first_step,
        "cause": str(error),
        "checkpoints_set_aside": later,
        "folder": str(aside.relative_to(folder)),
    }
    write_jsonl(folder / EVENTS, [*read_events(folder), event])
    return event


def keep_last_good(folder: Path, first_step: int) -> int:
    """Puts the last good checkpoint beyond the reach of rotation, as hard links. Returns its step, 0: none."""
    good = last_good_step(folder, first_step)
    target = folder / LAST_GOOD / f"{CHECKPOINT}{good}"
    if good and not target.exists():
        shutil.copytree(folder / "checkpoints" / target.name, target, copy_function=link_or_copy)
    return good


def num_to_keep(config: Config) -> int:
    """How many of the last checkpoints must be kept, so that one from before an alarm's first sign is still there."""
    stability = config.train.stability
    if stability.action != "rollback":
        return config.train.keep_last
    steps_back = stability.patience + stability.window + 2
    return max(config.train.keep_last, -(-steps_back // max(1, config.train.save_every)) + 1)


def link_or_copy(source: str, target: str) -> None:
    """For `shutil.copytree`: the file itself once more where the file system allows it, which takes no space."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _checkpoints(folder: Path) -> list[int]:
    return checkpoint_steps(folder / "checkpoints", CHECKPOINT)
