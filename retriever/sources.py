"""Corpora as people have them, brought into the one form that is served: a jsonl file and its offset table."""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from retriever.corpus import EXPECTED_ROW, check_document, parse_json
from retriever.errors import RetrieverError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PARQUET_ROWS_PER_BATCH = 4096
MAX_ROW_BYTES = 1 << 27
# As the Hugging Face Hub names the files of a large table
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<num>\d{5})")


def import_corpus(sources: Path | Sequence[Path], destination: Path) -> np.ndarray:
    """Checks every row of `sources`, writes it as jsonl to `destination`, and returns the offset table.

    Lines of jsonl are kept byte for byte, extra fields included, but for whole numbers as ids: the wire format has
    strings.

    Args:
        sources: a file, or the files of one corpus in order.

    Raises:
        RetrieverError: the first row that is not a document, by file and row.
    """
    files = [sources] if isinstance(sources, Path) else sources
    starts, position = array("q", [0]), 0  # 8 bytes a row, not the 40 of a list of integers
    with open(destination, "wb") as file:
        for source in files:
            for row, line in enumerate(read_lines(source)):
                line = _checked(line.rstrip(b"\r\n"), source, row) + b"\n"
                file.write(line)
                position += len(line)
                starts.append(position)
    if position == 0:
        raise RetrieverError(f"{', '.join(map(str, files))} is empty; expected rows like {EXPECTED_ROW}")
    return np.frombuffer(starts, dtype=np.int64)


def _checked(line: bytes, source: Path, row: int) -> bytes:
    document = parse_json(line, source, row)
    if isinstance(document, dict) and type(document.get("id")) is int:
        document["id"] = str(document["id"])
        line = orjson.dumps(document)
    check_document(document, source, row)
    return line


def read_lines(source: Path) -> Iterator[bytes]:
    """The json lines of a .jsonl, .jsonl.gz or .parquet file, in order, in constant memory."""
    if not source.is_file():
        raise RetrieverError(f"{source} does not exist; give a file that ends in {', '.join(SUFFIXES)}")
    if source.name.endswith(".parquet"):
        yield from _parquet_lines(source)
    elif source.name.endswith(".jsonl.gz"):
        try:
            with gzip.open(source, "rb") as lines:
                yield from _bounded(lines, source)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RetrieverError(f"{source} is not a whole gzip file ({error}); download it again") from None
    elif source.name.endswith(".jsonl"):
        with open(source, "rb") as lines:
            yield from _bounded(lines, source)
    else:
        raise RetrieverError(f"{source} has an unknown ending; expected {', '.join(SUFFIXES)}")


def _bounded(lines: IO[bytes] | gzip.GzipFile, source: Path) -> Iterator[bytes]:
    """The lines of a file, none longer than memory can take: a small gzip file may unpack to one of any length."""
    row = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise RetrieverError(f"{source} row {row} has more than {MAX_ROW_BYTES} bytes; expected one passage a line")
        yield line
        row += 1


def corpus_name(source: Path) -> str:
    """The file's name without its ending: what an index folder is called when a folder of corpora is built."""
    return next(source.name.removesuffix(suffix) for suffix in SUFFIXES if source.name.endswith(suffix))


def find_corpora(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each corpus in `folder`, by name; `NAME-00000-of-00004.parquet` and so on are one, called NAME.

    Raises:
        RetrieverError: there is none, two have one name, or a shard is missing.
    """
    found: dict[str, tuple[Path, ...]] = {}
    shards: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIXES):
            name = corpus_name(path)
            if shard := SHARD.fullmatch(name):
                shards[shard["name"], int(shard["num"])][int(shard["number"])] = path
            elif name in found:
                raise RetrieverError(f"{found[name][0]} and {path} are both called {name!r}; rename one")
            else:
                found[name] = (path,)
    for (name, num), paths in shards.items():
        first = 0 if 0 in paths else 1
        if missing := set(range(first, first + num)) - set(paths):
            raise RetrieverError(
                f"{folder}: of the {num} shards of {name!r}, {len(missing)} are missing, the first is number "
                f"{min(missing)}; download them all, or give one file as --corpus"
            )
        if name in found:
            raise RetrieverError(f"{found[name][0]} and {paths[first]} are both called {name!r}; rename one")
        found[name] = tuple(paths[number] for number in sorted(paths))
    if not found:
        raise RetrieverError(f"{folder} holds no corpus; expected files that end in {', '.join(SUFFIXES)}")
    return found


def _parquet_lines(source: Path) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise RetrieverError(f"{source} is not a parquet file ({error})") from None
    columns = table.schema_arrow.names
    if not {"id", "contents"} <= set(columns):
        raise RetrieverError(f"{source} has the columns {', '.join(columns)}; expected id and contents")
    for batch in table.iter_batches(PARQUET_ROWS_PER_BATCH):
        for row in batch.to_pylist():
            try:
                yield orjson.dumps(row)
            except TypeError as error:
                raise RetrieverError(f"{source} has a column that JSON cannot hold ({error}); leave it out") from None
