"""Search indexes behind one interface: exact inner product with FAISS, and BM25.

Answers are deterministic: equal scores are ordered by row, and a query's answer does not depend on its batch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retriever.encoders import Encoder
from retriever.errors import IndexFolderError

NO_ROW = -1
"""The id, with score -inf, that fills an answer that has fewer than `topk` passages."""

# FAISS multiplies by BLAS only when nq * d reaches this; its own default (128,000) scans batches below 167 queries of
# 768 dimensions one query at a time, 20 times slower. A single query is still scanned.
BLAS_THRESHOLD = 1500
# Candidates beyond topk that are scored again, so that rounding in FAISS cannot decide between near-equal passages.
NUM_SPARE_CANDIDATES = 8


class SearchIndex(Protocol):
    """Rows of a corpus, searched by text."""

    encoder: Encoder | None
    """Set where queries are vectors: the caller may encode for several indexes at once."""

    def __len__(self) -> int: ...

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages of each query, best first: int64 and float32, `[n, topk]`.

        `query_vectors` `[n, dimension]` saves encoding; an index of words ignores it.
        """
        ...


class FaissFlatIndex:
    """Exact inner product over unit vectors."""

    def __init__(self, index: Any, encoder: Encoder, *, num_threads: int = 1) -> None:
        import faiss

        faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
        faiss.omp_set_num_threads(num_threads)
        self.encoder: Encoder | None = encoder
        self._index = index
        # A view, not a copy: [num_passages, dimension]
        self._vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)

    @classmethod
    def load(cls, path: Path, encoder: Encoder, *, num_passages: int, num_threads: int = 1) -> "FaissFlatIndex":
        """Map an index file; raises `IndexFolderError` when file, encoder and corpus do not belong together."""
        import faiss

        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rsplit("Error: ", 1)[-1]
            raise IndexFolderError(f"{path} cannot be read as a FAISS index ({reason}); build it again") from None
        if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IndexFolderError(f"{path} is a {type(index).__name__}; expected a flat inner-product index")
        if index.ntotal != num_passages:
            raise IndexFolderError(
                f"{path} holds {index.ntotal} vectors, the corpus has {num_passages} passages; build it again"
            )
        if index.d != encoder.dimension:
            raise IndexFolderError(
                f"{path} holds vectors of {index.d} dimensions, the encoder makes {encoder.dimension}; "
                "build it again with this encoder"
            )
        return cls(index, encoder, num_threads=num_threads)

    @staticmethod
    def write(path: Path, vectors: np.ndarray) -> None:
        """Write `vectors` (float32 `[num_passages, dimension]`, unit length) as a flat index."""
        import faiss

        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        faiss.write_index(index, str(path))

    def __len__(self) -> int:
        return len(self._vectors)

    def vector(self, row: int) -> np.ndarray:
        """The stored vector `[dimension]` of a passage."""
        return self._vectors[row]

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.encoder is not None
        vectors = self.encoder.encode_queries(list(queries)) if query_vectors is None else query_vectors
        _, rows = self._index.search(vectors, min(topk + NUM_SPARE_CANDIDATES, len(self)))
        # [n, candidates, dimension] x [n, dimension, 1]: one product per query, the same in any batch
        scores = np.matmul(self._vectors[rows], vectors[:, :, None])[:, :, 0]
        best = np.lexsort((rows, -scores), axis=-1)[:, :topk]
        return _padded(np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1), topk)


class BM25Index:
    """Okapi BM25 (Lucene's form, by bm25s) over words; a passage's title counts twice. Only matches are returned."""

    def __init__(self, model: Any, num_passages: int) -> None:
        self.encoder: Encoder | None = None
        self._model, self._num_passages = model, num_passages

    @classmethod
    def load(cls, folder: Path, *, num_passages: int) -> "BM25Index":
        """Load a folder that `write` made; raises `IndexFolderError` when it is damaged or of another corpus."""
        import bm25s

        try:
            model = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise IndexFolderError(f"{folder} cannot be read as a BM25 index ({error}); build it again") from None
        if (seen := model.scores["num_docs"]) != num_passages:
            raise IndexFolderError(f"{folder} indexes {seen} passages, the corpus has {num_passages}; build it again")
        return cls(model, num_passages)

    @staticmethod
    def write(folder: Path, contents: Sequence[str], *, k1: float, b: float) -> None:
        """Index passages (`"Title"\\ntext`) into `folder`."""
        import bm25s

        model = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        words = [split_words(content.split("\n", 1)[0]) + split_words(content) for content in contents]
        model.index(words, show_progress=False)
        model.save(str(folder), show_progress=False)

    def __len__(self) -> int:
        return self._num_passages

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        num_candidates = min(topk, len(self))
        ids = np.full((len(queries), topk), NO_ROW, dtype=np.int64)
        best_scores = np.full((len(queries), topk), -np.inf, dtype=np.float32)
        for number, query in enumerate(queries):
            words = [word for word in split_words(query) if word in self._model.vocab_dict]
            if not words:
                continue
            scores = self._model.get_scores(words)  # [num_passages]
            threshold = np.partition(scores, len(self) - num_candidates)[len(self) - num_candidates]
            rows = np.flatnonzero((scores >= threshold) & (scores > 0))
            rows = rows[np.lexsort((rows, -scores[rows]))][:topk]
            ids[number, : len(rows)], best_scores[number, : len(rows)] = rows, scores[rows]
        return ids, best_scores


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, one-letter words and stop words included: names are made of them."""
    return re.findall(r"\w+", text.lower())


def _padded(rows: np.ndarray, scores: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Widen `[n, k]` answers to `[n, topk]` where the corpus is smaller than `topk`."""
    missing = ((0, 0), (0, topk - rows.shape[1]))
    return np.pad(rows, missing, constant_values=NO_ROW), np.pad(scores, missing, constant_values=-np.inf)
