"""What `--overwrite` may replace: a whole folder of our own making, and nothing that anybody would miss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from retriever.errors import RetrieverError


def check_target(
    target: Path, *, overwrite: bool, inputs: Iterable[Path], foreign: Callable[[Path], str | None]
) -> None:
    """Looks at a folder before it is made, and again before it takes its place.

    Args:
        target: the folder to be. Nothing, an empty folder, or with `overwrite` one of ours may be there.
        inputs: files and folders that the new one is made from.
        foreign: why a folder is not, or not only, what this program made; None where it is.

    Raises:
        RetrieverError: something else is there, or an input is `target`, lies in it, or holds it.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise RetrieverError(f"{target} is not a folder, and only index folders are replaced; choose another --out")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise RetrieverError(f"{target} exists; choose another folder, or pass --overwrite to replace it")
    if reason := foreign(target):
        raise RetrieverError(
            f"{target} is not replaced: {reason}; --overwrite replaces index folders only: choose another --out, or "
            "move it away"
        )
    place = target.resolve()
    for source in inputs:
        if (real := source.resolve()).is_relative_to(place) or place.is_relative_to(real):
            raise RetrieverError(
                f"{target} is not replaced: the new index is made from {source}, which would go with it; choose "
                "another --out"
            )
