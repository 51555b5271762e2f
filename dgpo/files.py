"""Files that are whole or absent: atomic writes, lines of json, and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside the target to write to. Leaving the block renames it: readers see the old file or the new one.

    If the block raises, the target stays as it was and nothing is left behind; a full disk is told by its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a rename can outlive a crash that the data did not
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replaces `path` by `data`, whole or not at all; makes its folder."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8, whole or not at all; makes its folder."""
    atomic_write_bytes(path, text.encode("utf-8"))


def json_line(record: Any) -> str:
    """A record as one line without its end; a dataclass in it is an object of its fields."""
    return json.dumps(record, default=_fields, ensure_ascii=False)


def write_jsonl(path: str | Path, records: Iterable[Any]) -> int:
    """Writes a line for each record, the file whole or not at all. Returns how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(f"{json_line(record)}\n")
            count += 1
    return count


def append_jsonl(path: str | Path, records: Iterable[Any]) -> None:
    """Adds a line for each record to a file that grows."""
    with Path(path).open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(f"{json_line(record)}\n" for record in records))


def read_jsonl(path: str | Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """The records of a file. Not by `splitlines`: a text may hold other line ends than a file's.

    Args:
        growing: no file yet holds no record, and a last line without its end is none: its writer runs, or was killed.
    """
    if growing and not Path(path).exists():
        return []
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if not growing or line.endswith("\n")]


def drop_records_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the records of later steps from a file that grows, the whole file where none is left.

    Returns:
        The others.
    """
    kept = [record for record in read_jsonl(path, growing=True) if record["step"] <= step]
    if kept:
        write_jsonl(path, kept)
    else:
        path.unlink(missing_ok=True)
    return kept


def share_as_umask_says(folder: str | Path) -> None:
    """Gives the weights in a folder the permissions of any new file: safetensors makes them their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def file_sha256(path: str | Path) -> str:
    """The file's checksum, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fields(value: object) -> dict[str, Any]:
    if is_dataclass(value):
        return vars(value)
    raise TypeError(f"{value!r} is no value of json")
