"""BM25 over words, by bm25s."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from retriever.encoders import Encoder
from retriever.errors import RetrieverError
from retriever.scan import NO_ROW

logger = logging.getLogger(__name__)

BM25_K1, BM25_B = 1.2, 0.3  # short passages differ little in length, so length counts little
# Han, kana, Thai, Lao, Myanmar, Khmer
UNSPACED = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"
)
MAX_UNSPACED_SHARE = 0.05


class BM25Index:
    """Okapi BM25 (Lucene's form, by bm25s) over words; a passage's title counts twice. Only matches are returned."""

    def __init__(self, model: Any, num_passages: int) -> None:
        self.encoder: Encoder | None = None
        self._model, self._num_passages = model, num_passages

    @classmethod
    def load(cls, folder: Path, *, num_passages: int) -> BM25Index:
        """Maps a folder that `write` made; raises `RetrieverError` when it is damaged or of another corpus."""
        import bm25s

        try:
            # Whatever its parameters say: no code but NumPy's walks its arrays
            model = bm25s.BM25.load(str(folder), mmap=True, show_progress=False, backend="numpy")
            _check_postings(model)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RetrieverError(f"{folder} cannot be read as a BM25 index ({error}); build it again") from None
        if (seen := model.scores["num_docs"]) != num_passages:
            raise RetrieverError(f"{folder} indexes {seen} passages, the corpus has {num_passages}; build it again")
        return cls(model, num_passages)

    @staticmethod
    def write(folder: Path, contents: Iterable[str], *, k1: float = BM25_K1, b: float = BM25_B) -> None:
        """Indexes passages (`"Title"\\ntext`) into `folder`; raises `RetrieverError` when there is no word in them."""
        import bm25s

        contents = Unspaced(contents)
        model = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        vocabulary: dict[str, int] = {}
        # Numbers instead of words as they come: 4 bytes a word, where a list of strings takes 60
        ids = [
            np.array(
                [
                    vocabulary.setdefault(word, len(vocabulary))
                    for word in split_words(content.split("\n", 1)[0]) + split_words(content)
                ],
                dtype=np.int32,
            )
            for content in contents
        ]
        if not vocabulary:
            raise RetrieverError("no passage has a word; expected text to index")
        if contents.share > MAX_UNSPACED_SHARE:
            logger.warning(
                "%.0f%% of the letters are of scripts that put no spaces between words (Chinese, Japanese, Thai, ..): "
                "BM25 finds such passages by whole phrases only. Build with a dense, multilingual encoder instead: "
                "--encoder intfloat/multilingual-e5-base --preset e5",
                100 * contents.share,
            )
        model.index((ids, vocabulary), show_progress=False)
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


def _check_postings(model: Any) -> None:
    """Raises `ValueError` unless every word's postings lie within the arrays."""
    starts, num_postings = model.scores["indptr"], len(model.scores["data"])
    if starts.ndim != 1 or len(model.scores["indices"]) != num_postings or len(starts) < 2:
        raise ValueError(f"{num_postings} scores for {len(model.scores['indices'])} passages")
    if starts[0] != 0 or starts[-1] != num_postings or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"its words' postings do not end at {num_postings}, their number")
    numbers = (number for word, number in model.vocab_dict.items() if word)  # bm25s adds an empty one
    if not all(isinstance(number, int) and 0 <= number < len(starts) - 1 for number in numbers):
        raise ValueError(f"a word has no postings among {len(starts) - 1}")


class Unspaced:
    """Passes texts on, and counts their letters of scripts without spaces between words."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._num_letters = self._num_unspaced = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not text.isascii():
                self._num_unspaced += sum(map(len, UNSPACED.findall(text)))
            self._num_letters += sum(map(str.isalpha, text)) if not text.isascii() else len(text)
            yield text

    @property
    def share(self) -> float:
        """The share of unspaced scripts among all letters seen so far."""
        return self._num_unspaced / max(1, self._num_letters)


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and their marks; one-letter and stop words too: names are made of them.

    Text is brought into one form first (NFKC), so that a composed letter is found by its parts and the reverse.
    """
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    return _word_pattern().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _word_pattern() -> re.Pattern[str]:
    """Letters and digits with the marks that follow them: without these, words of Hindi fall into consonants."""
    marks = (chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"\w[\w{''.join(marks)}]*")
