"""What may be replaced: a folder that one of our stages made, and in which nothing else has been put since."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dgpo.errors import ConfigError
from dgpo.runs.artifacts import MANIFEST


def check_target(
    path: str | Path,
    *,
    key: str,
    stage: str,
    replace: bool,
    flag: str | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Raises `ConfigError` unless `path` may become a stage's folder, whatever is there being deleted.

    It may where nothing is there, or an empty folder; with `replace` also a folder that the same stage finished, and
    that holds no file beside those of its manifest. It may never be or hold what the stage reads.

    Args:
        key: what the user named the path by.
        stage: that will write it.
        replace: whether the user asked for it.
        flag: the key that asks for it, where there is one.
        inputs: files and folders that the stage reads; None for those not set.
    """
    path = Path(path)
    place = path.resolve()
    for source in (Path(each).resolve() for each in inputs if each is not None):
        if source.exists() and place in (source, *source.parents):
            raise ConfigError(f"{key}={path} holds what is read, {source}: choose another {key}")
    if not (path.exists() or path.is_symlink()) or (path.is_dir() and not any(path.iterdir())):
        return
    if not replace:
        way_out = f", or replace it with {flag}=true" if flag else ""
        raise ConfigError(f"{path} exists: choose another {key}{way_out}")
    reason = _foreign(path, stage)
    if reason:
        raise ConfigError(f"{path} is not replaced: {reason}; move it away, or choose another {key}")


def _foreign(path: Path, stage: str) -> str | None:
    """Why a path is not the folder that a stage left, in a few words; None where it is."""
    if path.is_symlink() or not path.is_dir():
        return "it is no folder"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        made_by, names = manifest["stage"], {MANIFEST, *manifest["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        return f"it holds no {MANIFEST} of ours"
    if made_by != stage:
        return f"{made_by!r} made it, and not {stage!r}"
    others = [
        name
        for file in path.rglob("*")
        if (file.is_symlink() or not file.is_dir()) and (name := file.relative_to(path).as_posix()) not in names
    ]
    return f"{min(others)} in it is not of {stage!r}" if others else None
