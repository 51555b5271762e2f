"""A stage's records of one model, one JSON line each, and whether an earlier run has finished them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import MANIFEST, read_manifest


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One line each, the file whole or not at all."""
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def finished_records(folder: Path, *, stage: str, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """`scores.jsonl` of a model that was finished from the same inputs; None, and no manifest any more, for others.

    Raises:
        ManifestError: the folder is another stage's, or a file in it has changed.
    """
    if not (folder / MANIFEST).exists():
        return None
    if read_manifest(folder, stage=stage)["inputs"] != inputs:
        (folder / MANIFEST).unlink()
        return None
    return read_records(folder / "scores.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a whole file. Not `splitlines`: a text may hold other line ends than a file's."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
