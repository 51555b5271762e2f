"""Checkpoints of an unfinished training that can be trusted: written whole, or skipped with a message."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.artifacts import atomic_write_text
from dgpo.coldstart.errors import CheckpointMismatchError

COMPLETE = "complete.json"  # written last; lists the size of every other file
SETTINGS = "settings.json"


def mark_complete(folder: Path) -> None:
    """The last act of saving: from now on `latest_checkpoint` trusts the folder."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    atomic_write_text(folder / COMPLETE, json.dumps(sizes, indent=1))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole `checkpoint-<step>` in `folder`, None without one. Names on stderr those that it skips."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if _is_complete(path):
            return path
        print(f"{path} is half-written: the run ended while it was saved; skipped", file=sys.stderr, flush=True)
    return None


def remove_half_written(folder: Path) -> None:
    """Before training goes on and saves the same steps again."""
    for path in folder.glob("checkpoint-*"):
        if not _is_complete(path):
            shutil.rmtree(path)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Records what the checkpoints in `folder` depend on, or compares it with what was recorded.

    Raises:
        CheckpointMismatchError: it differs; names the keys.
    """
    path, text = folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True, default=str)
    if not path.exists():
        atomic_write_text(path, text)
        return
    before, now = json.loads(path.read_text()), json.loads(text)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise CheckpointMismatchError(
            f"the checkpoints in {folder} were made with other settings ({', '.join(changed)}): go back to them, "
            "delete the folder, or choose another run_dir"
        )


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE]
