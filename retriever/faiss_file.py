"""FAISS index files: their header, their rows by memory map, and writing one without holding it in memory.

Every kind begins with the same header, so a wrong or cut-off file is noticed without loading it. In `Flat` (float32)
and `SQfp16` (float16) files the rows themselves come last: they serve FAISS, the torch scan and the rescoring alike.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retriever.errors import RetrieverError

# Index types (FAISS factory strings) whose files end in plain rows.
ROW_DTYPES: dict[str, type[np.floating]] = {"Flat": np.float32, "SQfp16": np.float16}
# Rows that a quantizer sees in training, and the least number per inverted list that FAISS's clustering wants.
NUM_TRAINING_ROWS, NUM_TRAINING_ROWS_PER_LIST = 100_000, 64
BLOCK_BYTES = 1 << 25
GRAPH_SEARCH_PARAMS = "efSearch=128"  # of a graph made here, where nothing is said

# fourcc, dimension, rows, two unused, is_trained, metric (faiss/impl/index_write.cpp: write_index_header)
_HEADER = struct.Struct("<4siqqq?i")
# HNSW over plain, scalar and product quantised rows, and inverted lists of each
GRAPHS_AND_LISTS = (b"IHNf", b"IHNs", b"IHNp", b"IwFl", b"IwSq", b"IwPQ")
_ROWS_OFFSET, _INNER_PRODUCT = 8, 0

ReadRows = Callable[[int, int], np.ndarray]  # rows `[start, end)` as an array `[end - start, dimension]`


class Header(NamedTuple):
    """What each FAISS file says at its start."""

    dimension: int
    num_rows: int


def read_header(path: Path) -> Header:
    """The header of a FAISS file; raises `RetrieverError` when there is none that this file can be of.

    Nothing is allocated by what a header says before it is compared with the size of its file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or not start[:1] == b"I" or not start[:4].isalnum():
        raise RetrieverError(f"{path} is not a FAISS index file (it begins with {start[:4]!r}); build it again")
    _, dimension, num_rows, _, _, is_trained, metric = _HEADER.unpack(start)
    if metric != _INNER_PRODUCT or not is_trained or dimension <= 0 or num_rows < 0:
        raise RetrieverError(
            f"{path} has metric {metric}, {dimension} dimensions, {num_rows} rows, trained: {is_trained}; expected a "
            "trained index of inner products (metric 0): build it again"
        )
    if num_rows > size or dimension > size:  # every row and every dimension takes a byte at least
        raise RetrieverError(
            f"{path} has {size} bytes, its header promises {num_rows} rows of {dimension} dimensions: it is cut off or "
            "damaged; copy it again, or build it again"
        )
    return Header(dimension, num_rows)


def open_index(path: Path, *, is_ivf: bool) -> Any:
    """A FAISS index with its arrays in a memory map; raises `RetrieverError` when the file is damaged."""
    import faiss

    read_header(path)
    # No array of a file is larger than the file: sizes in it are compared with this before memory is taken
    usual = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
    # Inverted lists have a memory map of their own; the other kinds share their arrays with the mapped file.
    flag = faiss.IO_FLAG_MMAP if is_ivf else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flag)
    except (RuntimeError, MemoryError) as error:
        raise RetrieverError(
            f"{path} cannot be read as a FAISS index ({faiss_reason(error)}); build it again"
        ) from None
    finally:
        faiss.set_deserialization_vector_byte_limit(usual)


def file_type(path: Path) -> str:
    """The factory string of a FAISS file, by what stands in it rather than by its name.

    Raises:
        RetrieverError: it is none, or of a kind whose rows are not numbered as the corpus is.
    """
    import faiss

    read_header(path)
    with open(path, "rb") as file:
        kind = file.read(4)
        file.seek(_HEADER.size)
        quantizer = int.from_bytes(file.read(4), "little")
    if kind == b"IxFI":
        return "Flat"
    if kind == b"IxSQ":
        return _quantizer_name(path, quantizer)
    if kind not in GRAPHS_AND_LISTS:
        raise RetrieverError(
            f"{path} is a FAISS file of the kind {kind.decode(errors='replace')}; expected Flat, a scalar quantizer, "
            "HNSW or IVF: take the vectors as a Flat file, or build the index again"
        )
    index: Any = open_index(path, is_ivf=kind.startswith(b"Iw"))
    codes: Any = faiss.downcast_index(index.storage) if kind.startswith(b"IHN") else index
    name = "Flat"
    if hasattr(codes, "pq"):
        name = f"PQ{codes.pq.M}x{codes.pq.nbits}"
    elif hasattr(codes, "sq"):
        name = _quantizer_name(path, codes.sq.qtype)
    if kind.startswith(b"Iw"):
        return f"IVF{index.nlist},{name}"
    return f"HNSW{index.hnsw.nb_neighbors(1)}" + ("" if name == "Flat" else f"_{name}")


def _quantizer_name(path: Path, number: int) -> str:
    import faiss

    kinds: Any = faiss.ScalarQuantizer
    names = {"SQ4": kinds.QT_4bit, "SQ6": kinds.QT_6bit, "SQ8": kinds.QT_8bit}
    names |= {"SQfp16": kinds.QT_fp16, "SQbf16": kinds.QT_bf16}
    for name, known in names.items():
        if number == known:
            return name
    raise RetrieverError(f"{path} has the scalar quantizer {number}; expected one of {', '.join(names)}")


def open_rows(path: Path, index_type: str) -> ReadRows:
    """Reads the vectors of a file of any type that `file_type` gives, decoded where they are quantised."""
    if index_type in ROW_DTYPES:
        return row_reader(path, index_type)
    import faiss

    index: Any = open_index(path, is_ivf="IVF" in index_type)
    if lists := faiss.try_extract_index_ivf(index):
        try:
            lists.make_direct_map()
        except RuntimeError as error:
            raise RetrieverError(
                f"{path} has row numbers of its own ({faiss_reason(error)}); expected those of the corpus, from 0 on"
            ) from None
    return lambda start, end: index.reconstruct_n(start, end - start)


def map_rows(path: Path, index_type: str) -> np.memmap:
    """The rows of a `Flat` or `SQfp16` file, memory-mapped: `[num_rows, dimension]`, float32 or float16.

    Raises `RetrieverError` when the file is cut off, or of another kind.
    """
    header, dtype = read_header(path), np.dtype(ROW_DTYPES[index_type])
    num_values = header.num_rows * header.dimension
    size, expected = path.stat().st_size, num_values * dtype.itemsize
    offset = size - expected
    stored = -1
    if offset >= _HEADER.size + 8:
        with open(path, "rb") as file:
            file.seek(offset - 8)
            stored = int.from_bytes(file.read(8), "little")
    # FAISS counts Flat's rows in floats, a quantizer's in bytes
    if stored != (num_values if index_type == "Flat" else expected):
        raise RetrieverError(
            f"{path} has {size} bytes; expected a {index_type} index of {header.num_rows} rows of {header.dimension} "
            f"dimensions, at least {expected} bytes: it is cut off or of another kind; copy it again, or build it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(header.num_rows, header.dimension))


def row_reader(path: Path, index_type: str) -> ReadRows:
    """Reads rows of a `Flat` or `SQfp16` file without mapping them, so that a pass over 64 GB stays out of memory."""
    rows = map_rows(path, index_type)
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the reader lives)
    offset, row_bytes, dtype = int(rows.offset), rows.shape[1] * rows.itemsize, rows.dtype

    def read(start: int, end: int) -> np.ndarray:
        position, count = offset + start * row_bytes, (end - start) * row_bytes
        data = os.pread(file.fileno(), count, position)
        while len(data) < count:  # one read returns at most 2 GiB
            data += os.pread(file.fileno(), count - len(data), position + len(data))
        os.posix_fadvise(file.fileno(), position, count, os.POSIX_FADV_DONTNEED)
        return np.frombuffer(data, dtype=dtype).reshape(end - start, -1).astype(np.float32, copy=False)

    return read


def write_index(
    path: Path,
    index_type: str,
    read_rows: ReadRows,
    *,
    num_rows: int,
    dimension: int,
    search_params: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the rows that `read_rows` gives as an index of `index_type` (a FAISS factory string), inner product.

    Flat and scalar-quantised rows go straight to the file, in constant memory; the other kinds (HNSW, IVF, ..) are
    built in memory, because FAISS has to. Raises `RetrieverError` for a factory string that FAISS refuses.
    """
    import faiss

    index = make_index(index_type, dimension, search_params)
    if not index.is_trained:
        check_trainable(index_type, dimension, num_rows)
        index.train(read_sample(read_rows, num_rows, _num_training_rows(index)))
    blocks = read_blocks(read_rows, num_rows, dimension)
    if not isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        for end, block in blocks:
            index.add(block)
            if progress:
                progress(end, num_rows)
        faiss.write_index(index, str(path))
        return
    head = bytearray(faiss.serialize_index(index).tobytes())  # ends in the number of code bytes, 0 so far
    num_code_bytes = num_rows * index.sa_code_size()
    head[_ROWS_OFFSET : _ROWS_OFFSET + 8] = num_rows.to_bytes(8, "little")
    head[-8:] = (num_code_bytes // (4 if isinstance(index, faiss.IndexFlat) else 1)).to_bytes(8, "little")
    with open(path, "wb") as file:
        file.write(head)
        for end, block in blocks:
            index.sa_encode(block).tofile(file)
            if progress:
                progress(end, num_rows)


def make_index(index_type: str, dimension: int, search_params: str = "") -> Any:
    """An empty FAISS index; raises `RetrieverError` when FAISS does not know the type or the parameters."""
    import faiss

    try:
        index = faiss.index_factory(dimension, index_type, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RetrieverError(
            f"index type {index_type!r} is refused by FAISS for {dimension} dimensions ({faiss_reason(error)}); "
            "expected a factory string such as Flat, SQfp16, SQ8, HNSW32_SQ8 or IVF4096,PQ64"
        ) from None
    set_search_params(index, search_params)
    return index


def check_trainable(index_type: str, dimension: int, num_rows: int) -> None:
    """Raises `RetrieverError` when a type has more centroids to learn than there are rows to learn them from."""
    import faiss

    index: Any = make_index(index_type, dimension)
    lists: Any = faiss.try_extract_index_ivf(index)
    if lists and lists.nlist > num_rows:
        raise RetrieverError(
            f"index type {index_type!r} has {lists.nlist} inverted lists, the corpus {num_rows} passages; expected "
            "fewer lists, or Flat for a corpus of this size"
        )
    quantizer = getattr(faiss.downcast_index(lists or index), "pq", None)
    if quantizer and quantizer.ksub > num_rows:
        raise RetrieverError(
            f"index type {index_type!r} learns {quantizer.ksub} centroids, the corpus has {num_rows} passages; "
            "expected at least as many, or Flat for a corpus of this size"
        )


def default_search_params(index_type: str) -> str:
    """What a graph of ours is searched with where nothing is said: FAISS's own efSearch=16 loses answers
    (docs/retrieval-at-scale.md). Of lists it depends on their number, and FAISS's nprobe=1 stays."""
    return GRAPH_SEARCH_PARAMS if "HNSW" in index_type and "IVF" not in index_type else ""


def set_search_params(index: Any, search_params: str) -> None:
    """Apply FAISS's notation, such as `efSearch=128` or `nprobe=32`; raises `RetrieverError` when it does not fit."""
    import faiss

    if not search_params:
        return
    space: Any = faiss.ParameterSpace()
    try:
        space.set_index_parameters(index, search_params)
    except RuntimeError as error:
        raise RetrieverError(
            f"search parameters {search_params!r} do not fit a {type(index).__name__} ({faiss_reason(error)}); "
            "HNSW takes efSearch=N, IVF nprobe=N, Flat none"
        ) from None


def read_blocks(read_rows: ReadRows, num_rows: int, dimension: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows and the row after each."""
    step = max(1, BLOCK_BYTES // (4 * dimension))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        yield end, np.ascontiguousarray(read_rows(start, end), dtype=np.float32)


def read_sample(read_rows: ReadRows, num_rows: int, num_wanted: int) -> np.ndarray:
    """About `num_wanted` rows in runs that are spread evenly: float32 `[n, dimension]`."""
    if num_wanted >= num_rows:
        return np.ascontiguousarray(read_rows(0, num_rows), dtype=np.float32)
    num_runs = min(1000, num_wanted)
    length = num_wanted // num_runs
    starts: Iterable[int] = np.linspace(0, num_rows - length, num_runs).astype(np.int64).tolist()
    return np.concatenate([read_rows(start, start + length) for start in starts]).astype(np.float32, copy=False)


def refuse_non_finite(
    read_rows: ReadRows, num_rows: int, dimension: int, what: object, index_type: str = "Flat"
) -> None:
    """Raises `RetrieverError`, with count and first row, unless every number is finite where `index_type` keeps it.

    One such row makes a product over all of them answer nonsense, and can itself never be found.
    """
    limit = np.finfo(ROW_DTYPES.get(index_type, np.float32)).max
    bad: list[int] = []
    for end, block in read_blocks(read_rows, num_rows, dimension):
        # Not a comparison of infinities: false for NaN too
        fits = (np.abs(block) <= limit).all(axis=1)
        bad += (np.flatnonzero(~fits) + (end - len(block))).tolist()
    if bad:
        raise RetrieverError(
            f"{len(bad)} of {num_rows} vectors of {what} are not finite (NaN, or beyond {limit:.4g}), the first is row "
            f"{bad[0]}; expected finite numbers: take the file again, or encode again (--dtype float32)"
        )


def faiss_reason(error: Exception) -> str:
    """A FAISS message without its place in the C++ source."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", (str(error) or type(error).__name__).splitlines()[0])


def _num_training_rows(index: Any) -> int:
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    return max(NUM_TRAINING_ROWS, NUM_TRAINING_ROWS_PER_LIST * ivf.nlist if ivf else 0)
