"""Json lines as people write them: every line that cannot be used is named with its file, number and reason."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgpo.errors import DataError

NUM_SHOWN = 3


class BadLines:
    """Lines that cannot be used; up to `limit` are left out, one more is an error that names them."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.reasons: list[str] = []

    def add(self, path: Path, number: int | None, reason: str) -> None:
        """`number` counts from 1; None: the whole file."""
        self.reasons.append(f"{path}, line {number}: {reason}" if number else f"{path}: {reason}")

    def check(self) -> None:
        """Raises `DataError` that lists the first of them where there are more than the limit."""
        if len(self.reasons) > self.limit:
            shown = "; ".join(self.reasons[:NUM_SHOWN])
            more = f"; and {len(self.reasons) - NUM_SHOWN} more" if len(self.reasons) > NUM_SHOWN else ""
            noun = "line" if len(self.reasons) == 1 else "lines"
            raise DataError(
                f"{len(self.reasons)} unusable {noun}, prepare.max_bad_lines={self.limit}: {shown}{more}. Correct "
                "them, or raise the limit to leave them out"
            )


def read_objects(path: Path, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a .jsonl or .jsonl.gz file; blank lines are skipped, others go to `bad`.

    Raises:
        DataError: no such file, or one that is not whole gzip.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: correct the path")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except ValueError as error:  # UnicodeDecodeError is one too
                        bad.add(path, number, f"not valid JSON in UTF-8 ({error})")
                        continue
                    if isinstance(record, dict):
                        yield number, record
                    else:
                        bad.add(path, number, f"{str(record)[:60]}, expected a json object")
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): get it again") from None
