"""A cross-encoder that reads query and passage together and puts the first stage's candidates in a better order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retriever.corpus import Corpus
from retriever.encoder_config import find_model, refuse_pickles
from retriever.encoders import Encoder
from retriever.errors import RetrieverError
from retriever.index import SearchIndex
from retriever.scan import NO_ROW

MAX_PAIR_TOKENS = 512


class Reranker:
    """A sentence-transformers `CrossEncoder`: scores of passages for one query."""

    def __init__(self, model: str, *, device: str = "cpu", trust_remote_code: bool = False) -> None:
        """`model` is a folder or a Hugging Face id; raises `RetrieverError` when it has no safetensors to load."""
        from sentence_transformers import CrossEncoder

        folder = find_model(model)
        refuse_pickles(folder)
        try:
            self._model = CrossEncoder(
                folder,
                device=device,
                max_length=MAX_PAIR_TOKENS,
                trust_remote_code=trust_remote_code,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, ImportError) as error:
            raise RetrieverError(
                f"reranker {model!r} cannot be loaded: {str(error).splitlines()[0]} (expected a cross-encoder's folder "
                "or Hugging Face id, with safetensors)"
            ) from None
        if self._model.num_labels != 1:
            raise RetrieverError(
                f"reranker {model!r} gives {self._model.num_labels} values per pair; expected one score: use a model "
                "trained for ranking, such as a BGE reranker or an MS MARCO cross-encoder"
            )

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """Scores `[num_passages]`, float32: logits, because a sigmoid of large ones would make ties."""
        from torch.nn import Identity

        pairs = [(query, passage) for passage in passages]
        scores = self._model.predict(pairs, activation_fn=Identity(), show_progress_bar=False)
        scores = np.asarray(scores, dtype=np.float32)
        if not np.isfinite(scores).all():
            raise FloatingPointError("the reranker gives a score that is not finite (NaN or infinite)")
        return scores


class RerankedIndex:
    """An index whose best `num_candidates` are put in order by a reranker, each query's own, query by query.

    The pairs of one query are scored together and never with another query's, so an answer does not depend on what it
    is batched with.
    """

    def __init__(self, index: SearchIndex, reranker: Reranker, corpus: Corpus, *, num_candidates: int) -> None:
        self.encoder: Encoder | None = index.encoder
        self._index, self._reranker, self._corpus = index, reranker, corpus
        self._num_candidates = num_candidates

    def __len__(self) -> int:
        return len(self._index)

    def search(
        self, queries: Sequence[str], topk: int, *, query_vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        found, _ = self._index.search(queries, max(topk, self._num_candidates), query_vectors=query_vectors)
        rows = np.full((len(queries), topk), NO_ROW, dtype=np.int64)
        scores = np.full((len(queries), topk), -np.inf, dtype=np.float32)
        for number, query in enumerate(queries):
            own = found[number][found[number] != NO_ROW]
            if not len(own):
                continue
            own_scores = self._reranker.score(query, [self._corpus[int(row)]["contents"] for row in own])
            best = np.lexsort((own, -own_scores))[:topk]
            rows[number, : len(best)], scores[number, : len(best)] = own[best], own_scores[best]
        return rows, scores
