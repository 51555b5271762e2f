"""Corpora as people have them, brought into the one form that is served: a jsonl file and its offset table."""

import gzip
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from retriever.corpus import EXPECTED_ROW, parse_row
from retriever.errors import CorpusError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PARQUET_ROWS_PER_BATCH = 4096
MAX_ROW_BYTES = 1 << 27


def import_corpus(source: Path, destination: Path) -> np.ndarray:
    """Check every row of `source`, write it as jsonl to `destination`, and return the offset table.

    Lines of jsonl are kept byte for byte, extra fields included. Raises `CorpusError` that names the first row that
    is not a document.
    """
    starts, position = array("q", [0]), 0  # 8 bytes a row, not the 40 of a list of integers
    with open(destination, "wb") as file:
        for row, line in enumerate(read_lines(source)):
            line = line.rstrip(b"\r\n") + b"\n"
            parse_row(line, source, row)
            file.write(line)
            position += len(line)
            starts.append(position)
    if position == 0:
        raise CorpusError(f"{source} is empty; expected rows like {EXPECTED_ROW}")
    return np.frombuffer(starts, dtype=np.int64)


def read_lines(source: Path) -> Iterator[bytes]:
    """The json lines of a .jsonl, .jsonl.gz or .parquet file, in order, in constant memory."""
    if not source.is_file():
        raise CorpusError(f"{source} does not exist; give a file that ends in {', '.join(SUFFIXES)}")
    if source.name.endswith(".parquet"):
        yield from _parquet_lines(source)
    elif source.name.endswith(".jsonl.gz"):
        try:
            with gzip.open(source, "rb") as lines:
                yield from _bounded(lines, source)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorpusError(f"{source} is not a whole gzip file ({error}); download it again") from None
    elif source.name.endswith(".jsonl"):
        with open(source, "rb") as lines:
            yield from _bounded(lines, source)
    else:
        raise CorpusError(f"{source} has an unknown ending; expected {', '.join(SUFFIXES)}")


def _bounded(lines: IO[bytes] | gzip.GzipFile, source: Path) -> Iterator[bytes]:
    """The lines of a file, none longer than memory can take: a small gzip file may unpack to one of any length."""
    row = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise CorpusError(f"{source} row {row} has more than {MAX_ROW_BYTES} bytes; expected one passage a line")
        yield line
        row += 1


def corpus_name(source: Path) -> str:
    """The file's name without its ending: what an index folder is called when a folder of corpora is built."""
    return next(source.name.removesuffix(suffix) for suffix in SUFFIXES if source.name.endswith(suffix))


def find_corpora(folder: Path) -> dict[str, Path]:
    """The corpus files of `folder` by name; raises `CorpusError` when there is none, or two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIXES):
            name = corpus_name(path)
            if name in found:
                raise CorpusError(f"{found[name]} and {path} are both called {name!r}; rename one")
            found[name] = path
    if not found:
        raise CorpusError(f"{folder} holds no corpus; expected files that end in {', '.join(SUFFIXES)}")
    return found


def _parquet_lines(source: Path) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{source} is not a parquet file ({error})") from None
    columns = table.schema_arrow.names
    if not {"id", "contents"} <= set(columns):
        raise CorpusError(f"{source} has the columns {', '.join(columns)}; expected id and contents")
    for batch in table.iter_batches(PARQUET_ROWS_PER_BATCH, columns=["id", "contents"]):
        for key, contents in zip(batch.column("id").to_pylist(), batch.column("contents").to_pylist(), strict=True):
            # Numbers are common as parquet ids; the wire format has strings.
            yield orjson.dumps({"id": str(key) if isinstance(key, int) else key, "contents": contents})
