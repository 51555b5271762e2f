"""Search indexes behind one interface, and the dense one: a scan for candidates, exact scores for the best.

Answers are deterministic: equal scores are ordered by row, and a query's answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from retriever.encoders import Encoder
from retriever.options import SearchOptions
from retriever.scan import NO_ROW, Scan

# Candidates beyond topk that are scored again, so that rounding in the scan cannot decide between near-equal passages.
NUM_SPARE_CANDIDATES = 8


class SearchIndex(Protocol):
    """Rows of a corpus, searched by text."""

    encoder: Encoder | None  # set where queries are vectors: the caller may encode for several indexes at once

    def __len__(self) -> int: ...

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages of each query, best first: int64 and float32, `[n, topk]`.

        `query_vectors` `[n, dimension]` saves encoding; an index of words ignores it.
        """
        ...


class DenseIndex:
    """Inner products with unit vectors: a scan finds candidates, stored rows score them again in float32."""

    def __init__(
        self,
        scan: Scan,
        encoder: Encoder,
        *,
        num_rows: int,
        rows: np.ndarray | None = None,
        num_candidates: int = SearchOptions.num_candidates,
    ) -> None:
        """`rows` `[num_rows, dimension]`, float32 or float16, memory-mapped; None = keep the scan's own scores."""
        self.encoder: Encoder | None = encoder
        self._scan, self._rows, self._num_rows, self._num_candidates = scan, rows, num_rows, num_candidates

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.encoder is not None
        vectors = self.encoder.encode_queries(list(queries)) if query_vectors is None else query_vectors
        num = min(max(topk + NUM_SPARE_CANDIDATES, self._num_candidates), len(self))
        rows, scores = self._scan.candidates(vectors, num)
        if self._rows is not None:
            scores = self._rescore(vectors, rows)
        best = np.lexsort((rows, -scores), axis=-1)[:, :topk]
        return _padded(np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1), topk)

    def _rescore(self, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Inner products `[n, candidates]`, the same in any batch: one product per query."""
        assert self._rows is not None
        # [n, candidates, dimension] x [n, dimension, 1]
        stored = self._rows[rows].astype(np.float32, copy=False)
        scores = np.matmul(stored, vectors[:, :, None])[:, :, 0]
        return np.where(rows == NO_ROW, -np.inf, scores)


def _padded(rows: np.ndarray, scores: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Widen `[n, k]` answers to `[n, topk]` where the corpus is smaller than `topk`."""
    missing = ((0, 0), (0, topk - rows.shape[1]))
    return np.pad(rows, missing, constant_values=NO_ROW), np.pad(scores, missing, constant_values=-np.inf)
