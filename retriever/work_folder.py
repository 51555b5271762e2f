"""Unfinished index folders: they lie hidden beside their targets, outlive a kill, and appear when they are complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from retriever.corpus import Corpus, read_offsets, write_offsets
from retriever.errors import RetrieverError
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE, foreign_content, sample_sha256
from retriever.replacing import check_target
from retriever.sources import import_corpus

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class WorkFolder:
    """Where unfinished index folders lie, and what they may replace when they are complete."""

    path: Path
    overwrite: bool
    inputs: tuple[Path, ...]

    def publish(self, name: str, target: Path) -> Path:
        """Rename a complete folder to its target, and return it.

        Raises `RetrieverError` when something has come there meanwhile that may not be replaced.
        """
        folder = self.path / name
        if not folder.exists():
            return target  # an earlier run was killed after this one was renamed
        check_target(target, overwrite=self.overwrite, inputs=self.inputs, foreign=foreign_content)
        (self.path / f"{name}.published").touch()
        if target.exists():  # a server that has the old files mapped keeps them until it closes
            target.rename(self.path / f"{name}.replaced")
        folder.rename(target)
        return target


@contextmanager
def work_folder(
    out_root: Path, names: Sequence[str], plan: Mapping[str, Any], *, overwrite: bool, inputs: Sequence[Path]
) -> Iterator[WorkFolder]:
    """A hidden folder in `out_root` for unfinished work, removed at the end, kept for resuming when parts lie in it.

    Raises `RetrieverError` when a target may not be replaced (see `check_target`), when another process builds it, or
    when the work that lies there has another plan or is not ours.
    """
    label = names[0] if len(names) == 1 else f"{len(names)}-corpora-{sha256(repr(names).encode()).hexdigest()[:8]}"
    work = out_root / f".{label}.building"
    for name in names:
        if not name or name in (".", ".."):
            raise RetrieverError(f"--out {out_root / name} has no name of its own; expected a folder to make")
        if not _is_published(work, name):
            check_target(out_root / name, overwrite=overwrite, inputs=inputs, foreign=foreign_content)
    left = {path.name for path in work.iterdir()} if work.is_dir() else set()
    if left - {"lock"} and PLAN_FILE not in left:
        raise RetrieverError(f"{work} is not an unfinished index of ours; move it away, or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RetrieverError(f"{work} is in use: another process builds this index; wait for it") from None
        plan_file, content = work / PLAN_FILE, json.dumps(plan, indent=2, default=str)
        if plan_file.exists() and plan_file.read_text() != content:
            if not overwrite:
                raise RetrieverError(
                    f"{work} holds an unfinished build with other settings (see {plan_file}); repeat that build's "
                    "command to finish it, or pass --overwrite to discard it"
                )
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        plan_file.write_text(content)
        try:
            yield WorkFolder(work, overwrite, tuple(inputs))
        except BaseException as error:
            if not any(work.glob("part-*.npy")):
                shutil.rmtree(work)
            else:
                error.add_note(f"what is encoded is kept in {work}; the same command goes on from there")
            raise
        shutil.rmtree(work)


def import_once(sources: Sequence[Path], folder: Path) -> Corpus:
    """The corpus in `folder`, copied from `sources` unless an earlier, killed run did; the note of that comes last."""
    path, table, note = folder / CORPUS_FILE, folder / OFFSETS_FILE, folder.with_name(f"{folder.name}.imported")
    seen = " ".join(sample_sha256(source) for source in sources if source.is_file())
    if folder.exists() and note.exists() and note.read_text() == seen:
        for left in folder.iterdir():  # an index that was not finished
            if left not in (path, table):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    else:
        for part in folder.parent.glob("part-*.npy"):  # they are of other passages
            part.unlink()
        folder.mkdir(exist_ok=True)
        write_offsets(table, import_corpus(sources, path))
        note.write_text(seen)
    return Corpus(path, read_offsets(table, path))


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or as what `source` links to: caches of models are made of links."""
    source = source.resolve()
    target.unlink(missing_ok=True)
    with suppress(OSError):  # another file system, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _is_published(work: Path, name: str) -> bool:
    return (work / f"{name}.published").exists() and not (work / name).exists()
