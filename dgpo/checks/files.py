"""What a stage reads and writes: question files, a free folder of its own, the collected episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgpo.config.load import ConfigError
from dgpo.config.schema import Config
from dgpo.config.stages import collection
from dgpo.data.rows import DataError, read_rows
from dgpo.runs.artifacts import RunFolderExistsError


def check_stage_folder(config: Config, stage: str) -> None:
    folder = Path(config.run_dir) / stage
    if not config.resume and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderExistsError(f"{folder} exists: continue it with resume=true, or choose another run_dir")


def check_rows(file: str | None, *, key: str) -> list[dict[str, Any]]:
    if not file:
        raise ConfigError(f"{key} is not set: name a parquet file of questions")
    try:
        return read_rows(file)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_collection(config: Config, notes: list[str]) -> None:
    folder = collection(config)
    episodes = folder / "episodes.jsonl"
    if not episodes.is_file():
        if config.dry_run and "collect" in config.stages:
            notes.append(f"{episodes}: will be written by collect")
            return
        raise ConfigError(f"{episodes} does not exist: run `python -m dgpo collect` with this run_dir first")
    if not episodes.stat().st_size:
        raise ConfigError(f"{episodes} is empty: the teacher answered no question; see {folder / 'manifest.json'}")
