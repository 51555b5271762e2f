"""Checkpoints of an unfinished run that can be trusted: whole, or skipped with a message. RL's and distillation's.

A checkpoint is a folder `<prefix><step>` whose `manifest.json` was written last and lists every other file with its
size and SHA-256. Without one it is half-written; with one that does not match it is damaged. Neither is ever loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import MANIFEST, package_versions

DAMAGED = "damaged"  # beside the checkpoints: those that were skipped
NUM_HASHING_THREADS = 8
FULL_BYTES = 1_000_000  # a disk with less room is full

FileEntries = dict[str, dict[str, Any]]


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A folder beside the target to write to and `seal`. Leaving the block renames it.

    If the block raises, the space is given back and the target stays as it was.

    Raises:
        OSError: ENOSPC, whatever the block raised on a full disk: torch's own error speaks of positions.
    """
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except (OSError, RuntimeError) as error:
        if shutil.disk_usage(target.parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_entries(folder: Path, names: Iterable[str] | None = None) -> FileEntries:
    """Size and SHA-256 of files below `folder`, which are on the disk and not only in memory when this returns.

    Args:
        names: relative paths; None: every file but the manifest.
    """
    if names is None:
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = (name for name in found if name != MANIFEST)
    chosen = sorted(names)
    with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
        return dict(zip(chosen, pool.map(lambda name: _entry(folder / name), chosen), strict=True))


def seal(folder: Path, *, files: FileEntries | None = None, **facts: Any) -> None:
    """The last act of saving: from now on the folder is trusted.

    Args:
        files: from `file_entries`, where those who wrote the files have made it already.
        facts: what the manifest says beside that: step, number of ranks, ..
    """
    manifest = {**facts, "versions": package_versions(), "files": file_entries(folder) if files is None else files}
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_seal(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was sealed."""
    try:
        files: Mapping[str, Any] = read_seal(folder)["files"]
    except FileNotFoundError:
        return f"half-written: it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error!r})"
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["size"]:
            return f"{name} " + ("is missing" if size is None else f"has {size} bytes, expected {expected['size']}")
    for name, entry in file_entries(folder, files).items():
        if entry != files[name]:
            return f"{name} has changed: SHA-256 {entry['sha256'][:12]}.., expected {files[name]['sha256'][:12]}.."
    return None


def checkpoint_steps(folder: Path, prefix: str) -> list[int]:
    """Steps of the sealed checkpoints, ascending; whether they are damaged is not looked into."""
    return sorted(step for step in _all_steps(folder, prefix) if (folder / f"{prefix}{step}" / MANIFEST).is_file())


def newest_whole(folder: Path, prefix: str) -> Path | None:
    """The newest whole checkpoint, None without one. Names on stderr those that it skips."""
    for step in reversed(_all_steps(folder, prefix)):
        path = folder / f"{prefix}{step}"
        wrong = damage(path)
        if wrong is None:
            return path
        print(f"checkpoint {path} is skipped: {wrong}", file=sys.stderr, flush=True)
    return None


def set_aside_later(folder: Path, prefix: str, checkpoint: Path | None) -> None:
    """Moves what is newer than the checkpoint that a run goes on from into `damaged/`, and removes unfinished writes.

    The run will save those steps again, and rotation must not count damaged ones as kept.
    """
    for unfinished in folder.glob(f".{prefix}*.writing"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for step in _all_steps(folder, prefix):
        path = folder / f"{prefix}{step}"
        if checkpoint is not None and step <= _step(checkpoint, prefix):
            continue
        aside = folder / DAMAGED / path.name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)


def steps_to_delete(
    steps: Iterable[int], scores: Mapping[int, float], *, keep_last: int, keep_best: int, keep: Iterable[int] = ()
) -> list[int]:
    """Steps of checkpoints that are neither among the last nor among the best.

    Args:
        steps: of the checkpoints there are.
        scores: step -> validation score, of the steps that have one; of equal ones the later is the better.
        keep_last, keep_best: how many of each; the newest checkpoint is always kept.
        keep: steps to keep besides.
    """
    there = sorted(steps)
    best = sorted((step for step in there if step in scores), key=lambda step: (scores[step], step), reverse=True)
    kept = {*there[-max(1, keep_last) :], *best[: max(0, keep_best)], *keep}
    return [step for step in there if step not in kept]


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # a manifest must not outlive a crash that the data did not
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def _all_steps(folder: Path, prefix: str) -> list[int]:
    names = [path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def _step(path: Path, prefix: str) -> int:
    return int(path.name.removeprefix(prefix))
