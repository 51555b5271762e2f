"""A stage's records of one model, one JSON line each, and whether an earlier run has finished them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import MANIFEST, read_manifest
from dgpo.runs.settings import differences


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One line each, the file whole or not at all."""
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def finished_records(folder: Path, *, stage: str, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """`scores.jsonl` of a model that was finished under these settings; None, and no manifest any more, under others.

    Raises:
        DataError: the folder is another stage's, or a file in it has changed.
    """
    if not (folder / MANIFEST).exists():
        return None
    before = read_manifest(folder, stage=stage).get("settings")
    difference = "what they depend on was not recorded" if before is None else differences(before, settings)
    if difference:
        print(f"{folder}: its episodes are played again ({difference})", file=sys.stderr, flush=True)
        (folder / MANIFEST).unlink()
        return None
    return read_records(folder / "scores.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a whole file. Not `splitlines`: a text may hold other line ends than a file's."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
