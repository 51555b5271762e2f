"""What a stage reads and writes: question files, a free folder of its own, the collected episodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.config.schema import Config
from dgpo.config.stages import collection
from dgpo.data.rows import check_ids, read_rows
from dgpo.errors import ConfigError, DataError
from dgpo.runs.artifacts import read_manifest
from dgpo.runs.owner import refuse_if_owned


def check_stage_folder(config: Config, stage: str) -> None:
    folder = Path(config.run_dir) / stage
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"run_dir={config.run_dir}: {there} is no folder that can be written to; choose another run_dir"
        )
    refuse_if_owned(folder)
    begun = folder.is_dir() and any(folder.iterdir())
    if begun and not config.resume:
        raise ConfigError(f"{folder} exists: continue it with resume=true, or choose another run_dir")
    if config.resume and not begun:
        print(f"resume=true: nothing to resume in {folder}, {stage} begins", flush=True)


def is_assumed(config: Config, file: str | None) -> bool:
    """Whether a plan for another machine (`dry_run.assume`) makes do without the file."""
    return config.dry_run.assume is not None and not (file and Path(file).exists())


def check_rows(
    config: Config, file: str | None, *, key: str, notes: list[str], named: bool = False
) -> list[dict[str, Any]]:
    """The questions of `file`; none, and a note, where a plan makes do without them.

    Args:
        named: each needs an id of its own.
    """
    if is_assumed(config, file):
        notes.append(f"{key}={file}: not here, planned with as many questions as the paper's")
        return []
    if not file:
        raise ConfigError(f"{key} is not set: name a parquet file of questions")
    try:
        rows = read_rows(file)
        if named:
            check_ids(rows, file)
        return rows
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_collection(config: Config, notes: list[str]) -> Trajectory | None:
    """The first of the collected episodes; None, and a note, where they are still to be collected."""
    folder = collection(config)
    episodes = folder / "episodes.jsonl"
    if not episodes.is_file():
        planned = "collect" in config.stages and not config.distill.episodes
        if config.dry_run and (planned or config.dry_run.assume):
            notes.append(f"{episodes}: will be written by collect")
            return None
        raise ConfigError(f"{episodes} does not exist: run `python -m dgpo collect` with this run_dir first")
    read_manifest(folder, stage="collect")
    if not episodes.stat().st_size:
        raise ConfigError(f"{episodes} is empty: the teacher answered no question; see {folder / 'manifest.json'}")
    return next(read_trajectories(episodes))
