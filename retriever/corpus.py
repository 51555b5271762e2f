"""Passages on disk: one json object per line, memory-mapped, any row in constant time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from retriever.errors import RetrieverError

SCAN_BYTES = 1 << 24
# Rows at whose start a cached offset table is compared with the file.
NUM_CHECKED_ROWS = 64
EXPECTED_ROW = r'{"id": "0", "contents": "\"Title\"\ntext"}'


def scan_offsets(path: str | Path) -> np.ndarray:
    """Byte offset of every line of `path`, and the file size as the last entry: int64 `[num_lines + 1]`."""
    starts, position = [np.zeros(1, dtype=np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(SCAN_BYTES):
            newlines = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            starts.append(newlines + (position + 1))
            position += len(block)
    offsets = np.concatenate(starts)
    if offsets[-1] != position:  # the last line has no newline
        offsets = np.append(offsets, position)
    return offsets


def read_offsets(path: Path, corpus_path: Path) -> np.ndarray | None:
    """The offset table cached at `path`, memory-mapped, or None when it is absent, damaged or of another file.

    Compared are the size of the corpus and the line breaks in front of a sample of rows.
    """
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0:
        return None
    if (offsets[1:] <= offsets[:-1]).any():
        return None
    if offsets[-1] != corpus_path.stat().st_size:
        return None
    rows = np.unique(np.linspace(1, len(offsets) - 2, NUM_CHECKED_ROWS).astype(np.int64))
    with open(corpus_path, "rb") as file:
        for row in rows[(rows >= 1) & (rows < len(offsets) - 1)]:
            file.seek(max(0, int(offsets[row]) - 1))
            if file.read(1) != b"\n":
                return None
    return offsets


def write_offsets(path: Path, offsets: np.ndarray) -> None:
    """Writes an offset table; whoever sees it sees the whole one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, offsets, allow_pickle=False)
    partial.replace(path)


def parse_row(line: bytes, path: str | Path, row: int) -> dict[str, Any]:
    """A json line as a document; raises `RetrieverError` that names the row when it lacks `id` and `contents`."""
    document = parse_json(line, path, row)
    check_document(document, path, row)
    return document


def parse_json(line: bytes, path: str | Path, row: int) -> Any:
    """A line's content; raises `RetrieverError` that names the row when it is not JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RetrieverError(f"{path} row {row} is not valid JSON ({error})") from None


def check_document(document: Any, path: str | Path, row: int) -> None:
    """Raises `RetrieverError` that names the row unless it has `id` and `contents`, both text."""
    for field in ("id", "contents"):
        value = document.get(field) if isinstance(document, dict) else None
        if not isinstance(value, str):
            raise RetrieverError(f'{path} row {row}: "{field}" is {value!r}; expected {EXPECTED_ROW}')


class Corpus:
    """Read-only rows of a jsonl corpus; row number = index id.

    Rows stay on disk and the kernel caches what is used, so 21 million passages cost no resident memory.
    The file must not change while it is open.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray | None = None) -> None:
        """Maps `path`; `offsets` (from `scan_offsets` or `read_offsets`) saves a pass over the file."""
        self.path = Path(path)
        if not self.path.is_file():
            raise RetrieverError(f"{self.path} does not exist; give a jsonl file of lines like {EXPECTED_ROW}")
        size = self.path.stat().st_size
        if size == 0:
            raise RetrieverError(f"{self.path} is empty; expected lines like {EXPECTED_ROW}")
        self.offsets = scan_offsets(self.path) if offsets is None else offsets
        if int(self.offsets[-1]) != size:
            raise RetrieverError(
                f"{self.path} has {size} bytes, but its offset table was made for {int(self.offsets[-1])}; "
                "the corpus changed after the index was built: build it again"
            )
        with open(self.path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes.madvise(mmap.MADV_RANDOM)  # a search touches single rows: reading ahead would only cost

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, row: int) -> bytes:
        """The json text of one row, as stored, without its line break."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the {len(self)} rows of {self.path}")
        return self._bytes[int(self.offsets[row]) : int(self.offsets[row + 1])].rstrip()

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row as `{"id", "contents"}`; raises `RetrieverError` that names the row when it is anything else."""
        return parse_row(self.raw(row), self.path, row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))
