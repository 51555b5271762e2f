"""A search of your own: BM25 inside the training process, over jsonl files, without a server.

python -m dgpo train retriever.backend=examples.jsonl_search:JsonlSearch \\
    retriever.backend_options.path=corpus.jsonl ...

It fits corpora of some 100,000 passages; beyond that a server (`python -m retriever.serve`) is the better place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from dgpo.agent.search import SearchRefusedError

K1, B = 1.2, 0.75  # BM25's usual saturation and length normalisation


class JsonlSearch:
    """BM25 over lines of `{"id": .., "contents": "\\"Title\\"\\ntext"}`.

    Args:
        path: a file, which answers for every corpus; or a folder with a `<corpus>.jsonl` for each named corpus.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        files = sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]
        self.indexes = {file.stem: Bm25(file) for file in files}

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        """The `topk` best documents, best first. Fewer where fewer share a word with the query.

        A backend that cannot answer raises `dgpo.agent.search.SearchFailedError`: the episode is then left out of the
        update and counted. Any other error counts too, and is shown when the run stops over it.
        """
        name = corpus if self.path.is_dir() else self.path.stem
        if name not in self.indexes:
            raise SearchRefusedError(f"no corpus {name!r} in {self.path}: it has {', '.join(self.indexes)}")
        return self.indexes[name].search(query, topk)


class Bm25:
    """An inverted index of one file."""

    def __init__(self, file: Path) -> None:
        self.documents: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        counts = [Counter(_words(document["contents"])) for document in self.documents]
        lengths = [sum(count.values()) for count in counts]
        mean_length = sum(lengths) / len(lengths)
        frequency = Counter(word for count in counts for word in count)
        self.postings: dict[str, list[tuple[int, float]]] = defaultdict(list)  # word -> [(document, weight)]
        for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, times in count.items():
                rarity = math.log(1 + (len(counts) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                weight = times * (K1 + 1) / (times + K1 * (1 - B + B * length / mean_length))
                self.postings[word].append((index, rarity * weight))

    def search(self, query: str, topk: int) -> list[dict[str, Any]]:
        scores: dict[int, float] = defaultdict(float)
        for word in _words(query):
            for index, weight in self.postings.get(word, ()):
                scores[index] += weight
        best = sorted(scores, key=lambda index: (-scores[index], index))[:topk]
        return [self.documents[index] for index in best]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
