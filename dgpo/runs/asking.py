"""How a finished run is asked: its rules, its model, and questions to begin with. `ask` and `Agent` read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dgpo.files import atomic_write_text

ASKING = "ask.json"


@dataclass(frozen=True)
class Asking:
    """What a run leaves for those who ask it.

    Attributes:
        overrides: the settings of the episodes, paths within the run left out.
        model: the checkpoint; below the run folder where it is relative.
        corpus: the default of the indexes in `indexes/`.
        examples: questions that one may click.
    """

    overrides: list[str]
    model: str
    corpus: str
    examples: list[str]


def write_asking(
    folder: Path, *, overrides: Sequence[str], model: str | Path, corpus: str, examples: Sequence[str]
) -> None:
    """Writes `ask.json`; a model below the folder is named from there, so that the folder may move."""
    place, folder = Path(model).absolute(), Path(folder).absolute()
    name = str(place.relative_to(folder)) if place.is_relative_to(folder) else str(model)
    record = Asking(list(overrides), name, corpus, list(examples))
    atomic_write_text(folder / ASKING, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def read_asking(folder: str | Path) -> Asking | None:
    """What the run left, its model as a path from here; None where it left nothing."""
    path = Path(folder) / ASKING
    if not path.is_file():
        return None
    record = Asking(**json.loads(path.read_text(encoding="utf-8")))
    below = Path(folder) / record.model
    return Asking(record.overrides, str(below) if below.exists() else record.model, record.corpus, record.examples)
