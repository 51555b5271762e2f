"""Files that are whole or absent: atomic writes, and checksums."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
