"""Passages on disk: one json object per line, memory-mapped, any row in constant time."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from retriever.errors import CorpusError

SCAN_BYTES = 1 << 24
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


class Corpus:
    """Read-only rows of a jsonl corpus; row number = index id.

    Rows stay on disk and the kernel caches what is used, so 21 million passages cost no resident memory.
    The file must not change while it is open.
    """

    def __init__(self, path: str | Path, offsets: np.ndarray | None = None) -> None:
        """Map `path`; `offsets` (from `scan_offsets`, possibly itself memory-mapped) saves a pass over the file."""
        self.path = Path(path)
        size = self.path.stat().st_size
        if size == 0:
            raise CorpusError(f"{self.path} is empty; expected lines like {EXPECTED_ROW}")
        self.offsets = scan_offsets(self.path) if offsets is None else offsets
        if int(self.offsets[-1]) != size:
            raise CorpusError(
                f"{self.path} has {size} bytes, but its offset table was made for {int(self.offsets[-1])}; "
                "the corpus changed after the index was built: build it again"
            )
        with open(self.path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, row: int) -> bytes:
        """The json text of one row, as stored, without its line break."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the {len(self)} rows of {self.path}")
        return self._bytes[int(self.offsets[row]) : int(self.offsets[row + 1])].rstrip()

    def __getitem__(self, row: int) -> dict[str, str]:
        """One row as `{"id", "contents"}`; raises `CorpusError` that names the row when it is anything else."""
        try:
            document = orjson.loads(self.raw(row))
        except orjson.JSONDecodeError as error:
            raise CorpusError(f"{self.path} row {row} is not valid JSON ({error})") from None
        for field in ("id", "contents"):
            value = document.get(field) if isinstance(document, dict) else None
            if not isinstance(value, str):
                raise CorpusError(f'{self.path} row {row}: "{field}" is {value!r}; expected {EXPECTED_ROW}')
        return document

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (self[row] for row in range(len(self)))
