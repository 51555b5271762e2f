"""The ways to find candidates for a query vector: FAISS on a CPU or a GPU, and an exact product in torch.

A scan is used by one thread at a time: FAISS on a GPU is not thread-safe.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retriever.encoder_config import has_native_bfloat16
from retriever.errors import RetrieverError
from retriever.faiss_file import ROW_DTYPES, faiss_reason, map_rows, open_index, set_search_params
from retriever.options import Engine, ScanDtype

NO_ROW = -1  # the id, with score -inf, that fills an answer that has fewer than `topk` passages

# FAISS multiplies by BLAS only when nq * d reaches this; its own default (128,000) scans batches below 167 queries of
# 768 dimensions one query at a time, 20 times slower. A single query is still scanned.
BLAS_THRESHOLD = 1500
# Scores held at once: what stays near a CPU's cache, and 1 GB in float32 on a GPU.
MAX_SCORES = {"cpu": 1 << 24, "cuda": 1 << 28}
# Scores compared by their maximum first: one pass finds the few groups that can hold the best.
GROUP_SIZE = 32
NUM_ROWS_FOR_MEAN = 10_000
COPY_ROWS = 1 << 15


class Scan(Protocol):
    """Finds the best rows for query vectors, exactly or nearly."""

    def candidates(self, vectors: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores, best first: int64 and float32 `[n, num]`, filled up with `NO_ROW` and -inf.

        `vectors` is float32 `[n, dimension]`; `num` is at most the number of rows.
        """
        ...


class FaissScan:
    """Any FAISS index file, memory-mapped: pages come in as they are searched, and the kernel may drop them.

    With `gpu` (its number) the index is copied there, and only rows that are scored again come from the map.
    """

    def __init__(
        self, path: Path, index_type: str, *, num_threads: int = 1, gpu: int | None = None, search_params: str = ""
    ) -> None:
        import faiss

        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
        faiss.omp_set_num_threads(num_threads)
        index = open_index(path, is_ivf="IVF" in index_type)
        self._mapped, self._dtype = index, ROW_DTYPES.get(index_type)
        set_search_params(index, search_params)  # a copy on a GPU, which knows other parameters, takes its own over
        self._index = index if gpu is None else _on_gpu(index, path, gpu)

    def rows(self) -> np.ndarray | None:
        """The rows `[num_rows, dimension]` of a Flat or SQfp16 index, None of other kinds.

        They lie in FAISS's own memory map, which lives as long as this scan.
        """
        import faiss

        if self._dtype is None:
            return None
        index: Any = self._mapped
        codes = faiss.rev_swig_ptr(index.codes.data(), index.codes.size())
        return codes.view(self._dtype).reshape(index.ntotal, index.d)

    def candidates(self, vectors: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), num)
        return rows, np.where(rows == NO_ROW, -np.inf, scores).astype(np.float32, copy=False)


class TorchScan:
    """Every row's inner product, in 16 bits on a GPU (or float32, or on a CPU with bfloat16), in blocks.

    A 16-bit copy holds each row minus a mean: all scores of a query move by the same amount, so their order stays,
    and what is left of vectors that all point one way (E5's cosines lie in .7-.9) is rounded far more finely.
    """

    def __init__(self, rows: np.ndarray, *, device: str = "cpu", dtype: ScanDtype = "auto") -> None:
        """`rows` `[num_rows, dimension]`, possibly memory-mapped: they are read once, block by block.

        Raises `RetrieverError` when the copy is not finite everywhere: each NaN would be among the best of all.
        """
        import torch

        if dtype == "auto":
            dtype = "float16" if device != "cpu" else "bfloat16" if has_native_bfloat16(device) else "float32"
        self._device, self._dtype = torch.device(device), getattr(torch, dtype)
        self._num_rows = len(rows)
        self._mean = torch.zeros(rows.shape[1])
        if dtype == "float32" and rows.dtype == np.float32 and device == "cpu":
            self._rows = _as_tensor(rows)  # the mapped file itself
            return
        if dtype != "float32":
            step = max(1, len(rows) // NUM_ROWS_FOR_MEAN)
            sample = rows[::step][:NUM_ROWS_FOR_MEAN].astype(np.float32)
            self._mean = torch.from_numpy(sample[np.isfinite(sample).all(axis=1)].mean(axis=0))
        self._rows = torch.empty(rows.shape, dtype=self._dtype, device=self._device)
        mean = self._mean.to(self._device)
        num_bad, first_bad = 0, -1
        for start in range(0, len(rows), COPY_ROWS):
            block = _as_tensor(rows[start : start + COPY_ROWS])
            copied = (block.to(self._device).float() - mean).to(self._dtype)
            total = copied.sum(dtype=torch.float32)  # one number: finite blocks cost next to nothing
            if not torch.isfinite(total):
                bad = (~torch.isfinite(copied)).any(dim=1).nonzero()[:, 0]
                first_bad = int(bad[0]) + start if len(bad) and not num_bad else first_bad
                num_bad += len(bad)
            self._rows[start : start + COPY_ROWS] = copied
            advise(rows, mmap.MADV_DONTNEED)  # the file's pages stay in the kernel's cache, if there is room
        if num_bad:
            raise RetrieverError(
                f"{num_bad} of {len(rows)} vectors are not finite in {dtype}, the first is row {first_bad}; expected "
                "finite numbers: copy the index again or make it again"
            )
        advise(rows, mmap.MADV_RANDOM)  # from now on only rows that are scored again are read

    def candidates(self, vectors: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            queries = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
            offset = queries @ self._mean  # [n], what the centred rows lack
            queries = queries.to(self._device).to(self._dtype)
            step = max(GROUP_SIZE, MAX_SCORES[self._device.type] // len(queries))
            found_scores, found_rows = [], []
            for start in range(0, self._num_rows, step):
                scores = self._product(queries, self._rows[start : start + step])
                best_scores, best_rows = best_of(scores, min(num, scores.shape[1]))
                found_scores.append(best_scores.float())
                found_rows.append(best_rows + start)
            scores, order = torch.cat(found_scores, dim=1).topk(num, dim=1)
            rows = torch.cat(found_rows, dim=1).gather(1, order)
            return rows.cpu().numpy(), (scores.cpu() + offset[:, None]).numpy()

    def _product(self, queries: Any, rows: Any) -> Any:
        """Scores `[n, block]`; float32 from 16-bit factors where torch can (CUDA), so that none are rounded to ties."""
        import torch

        if self._device.type == "cuda" and self._dtype != torch.float32:
            return torch.mm(queries, rows.T, out_dtype=torch.float32)
        return queries @ rows.T


def best_of(scores: Any, num: int) -> tuple[Any, Any]:
    """The `num` largest of each row of `scores` `[n, m]`, and their columns, best first.

    The best are among the `num` groups with the largest maxima, so most scores are read once and never sorted.
    """
    import torch

    width = scores.shape[1] // GROUP_SIZE
    if width <= num:
        return scores.topk(num, dim=1)
    # Group g holds the columns g, g + width, g + 2 * width, ..: neighbours stay together in memory.
    maxima = scores[:, : width * GROUP_SIZE].view(len(scores), GROUP_SIZE, width).amax(dim=1)
    groups = maxima.topk(num, dim=1).indices  # [n, num]
    steps = torch.arange(GROUP_SIZE, device=scores.device) * width
    columns = (groups[:, :, None] + steps).flatten(1)  # [n, num * GROUP_SIZE]
    rest = torch.arange(width * GROUP_SIZE, scores.shape[1], device=scores.device)
    columns = torch.cat([columns, rest.expand(len(scores), -1)], dim=1)
    best, order = scores.gather(1, columns).topk(num, dim=1)
    return best, columns.gather(1, order)


def open_scan(
    path: Path,
    index_type: str,
    *,
    engine: Engine = "auto",
    device: str = "cpu",
    scan_dtype: ScanDtype = "auto",
    num_threads: int = 1,
    search_params: str = "",
) -> tuple[Scan, np.ndarray | None]:
    """The scan of an index file, and the file's exact rows (memory-mapped) where it has them.

    Raises `RetrieverError` when `engine` cannot search this type.
    """
    if engine == "auto":
        engine = "torch" if device != "cpu" and index_type in ROW_DTYPES else "faiss"
    if engine != "torch":
        gpu = int(device.partition(":")[2] or 0) if engine == "faiss-gpu" else None  # "cuda:1" -> 1
        scan = FaissScan(path, index_type, num_threads=num_threads, gpu=gpu, search_params=search_params)
        return scan, scan.rows()
    if index_type not in ROW_DTYPES:
        raise RetrieverError(
            f"{path} is a {index_type} index, which the torch engine cannot scan; expected {' or '.join(ROW_DTYPES)}: "
            "use --engine faiss, or make one with python -m retriever.convert --to SQfp16"
        )
    rows = map_rows(path, index_type)
    return TorchScan(rows, device=device, dtype=scan_dtype), rows


def advise(rows: np.ndarray, advice: int) -> None:
    """Tell the kernel how memory-mapped rows are used next (`mmap.MADV_..`); nothing for rows in plain memory."""
    base: Any = rows
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base if isinstance(base, np.ndarray) else None
    if base is not None:
        base.madvise(advice)


def _as_tensor(rows: np.ndarray) -> Any:
    """A tensor over mapped, read-only rows; torch warns of writes that nobody makes."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.asarray(rows))


def _on_gpu(index: Any, path: Path, gpu: int) -> Any:
    """`index` copied to a GPU, float16 where FAISS can; raises `RetrieverError` where FAISS cannot."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise RetrieverError(
            "--engine faiss-gpu needs a FAISS with CUDA: pip install 'dgpo[retriever-gpu]', or use --engine torch"
        )
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    try:
        # The resources own the GPU's scratch memory and must outlive the index.
        resources = faiss.StandardGpuResources()
        copied: Any = faiss.index_cpu_to_gpu(resources, gpu, index, options)
    except RuntimeError as error:
        raise RetrieverError(
            f"{path} cannot be copied to the GPU ({faiss_reason(error)}); use --engine faiss"
        ) from None
    copied.referenced_objects = [resources]
    return copied
