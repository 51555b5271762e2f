"""Which run is asked, with which settings: the folder that is named, the one that holds the model, or the latest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgpo.config.load import chosen
from dgpo.errors import ConfigError
from dgpo.pipeline import tiny
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.asking import ASKING, Asking, read_asking

RUNS = Path("runs")


@dataclass(frozen=True)
class AskedRun:
    """A run folder with indexes of its own, and what it left for those who ask."""

    folder: Path
    asking: Asking


def find_run(overrides: Sequence[str]) -> AskedRun | None:
    """The run to ask, or None where the settings name a checkpoint that lies in none.

    Raises:
        ConfigError: `run_dir`, or world=tiny, without a finished run.
    """
    model, named = chosen("ask.model", overrides), chosen("run_dir", overrides)
    folders = [Path(named)] if named else list(Path(model).absolute().parents) if model else _latest_first()
    is_tiny = chosen("world", overrides) == "tiny"
    for folder in folders:
        asking = read_asking(folder) or (_of_quickstart(folder, model) if is_tiny else None)
        if asking and (not is_tiny or "world=tiny" in asking.overrides):
            return AskedRun(folder, asking)
    if is_tiny and model:
        raise ConfigError(f"no folder of the tiny world holds ask.model={model}: name a checkpoint of a quickstart")
    if is_tiny:
        raise ConfigError(f"no finished quickstart in {RUNS}: run `python -m dgpo quickstart` first, or set ask.model")
    if named and not model:
        raise ConfigError(f"run_dir={named} holds no {ASKING}: name a finished run of `dgpo own` or `quickstart`")
    return None


def _latest_first() -> list[Path]:
    finished = [*RUNS.glob(f"*/{ASKING}"), *RUNS.glob(f"quickstart*/train/model/{MANIFEST}")]
    finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent if path.name == ASKING else path.parents[2] for path in finished]


def _of_quickstart(folder: Path, model: str | None) -> Asking | None:
    """A tiny world that was not trained to its end, or by hand: its indexes serve any checkpoint in it."""
    trained = folder / "train" / "model"
    if not (folder / "indexes").is_dir() or not (model or trained.is_dir()):
        return None
    return Asking([*tiny.OVERRIDES], str(model or trained), tiny.CORPUS, [])
