"""Whether an earlier run has finished what a stage measures of a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.files import read_jsonl
from dgpo.runs.artifacts import MANIFEST, read_manifest
from dgpo.runs.settings import differences


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
    return read_jsonl(folder / "scores.jsonl")
