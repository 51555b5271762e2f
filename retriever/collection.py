"""Named corpora served together: one encoder instance per configuration, one encoding pass per batch of queries."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retriever.corpus import Corpus
from retriever.encoders import Encoder, EncoderConfig, load_encoder
from retriever.errors import IndexFolderError
from retriever.index import NO_ROW, BM25Index, FaissFlatIndex, SearchIndex
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE, Manifest, check_corpus, read_manifest

# bfloat16 on another processor moves a vector by about 1e-4; a wrong prefix or model by far more than this.
MIN_PROBE_COSINE = 0.98


LoadProgress = Callable[[str, int, int], None]
"""Called with the corpus that is loaded next, the number of corpora loaded, and of all."""


@dataclass(frozen=True)
class Hits:
    """One query's answer: rows of its corpus and their scores, best first."""

    rows: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class SearchJob:
    """The queries of one request: all of one corpus and one `topk`."""

    corpus: str
    queries: Sequence[str]
    topk: int


@dataclass(frozen=True)
class ServedCorpus:
    """A corpus with its index."""

    folder: Path
    manifest: Manifest
    corpus: Corpus
    index: SearchIndex


@dataclass
class Collection:
    """Loaded corpora by name. `search` belongs to one thread: GPU indexes and encoder counters are not thread-safe."""

    corpora: dict[str, ServedCorpus]
    encoders: dict[EncoderConfig, Encoder] = field(default_factory=dict)

    def search(self, jobs: Sequence[SearchJob]) -> list[list[Hits]]:
        """The hits of every query of every job, in order."""
        vectors = self._encode(jobs)
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, job in enumerate(jobs):
            groups[job.corpus, job.topk].append(number)
        answers: list[list[Hits]] = [[] for _ in jobs]
        for (name, topk), numbers in groups.items():
            index = self.corpora[name].index
            queries = [query for number in numbers for query in jobs[number].queries]
            if not queries:
                continue
            known = vectors.get(id(index.encoder))
            query_vectors = None if known is None else np.stack([known[query] for query in queries])
            hits = iter(_to_hits(*index.search(queries, topk, query_vectors=query_vectors)))
            for number in numbers:
                answers[number] = [next(hits) for _ in jobs[number].queries]
        return answers

    def _encode(self, jobs: Sequence[SearchJob]) -> dict[int, dict[str, np.ndarray]]:
        """Vectors by encoder (its `id`) and query; a query asked of many corpora is encoded once."""
        wanted: dict[int, dict[str, None]] = defaultdict(dict)
        encoders: dict[int, Encoder] = {}
        for job in jobs:
            encoder = self.corpora[job.corpus].index.encoder
            if encoder is not None:
                encoders[id(encoder)] = encoder
                wanted[id(encoder)].update(dict.fromkeys(job.queries))
        return {
            key: dict(zip(queries, encoders[key].encode_queries(list(queries)), strict=True))
            for key, queries in wanted.items()
        }


def load_collection(
    folders: Mapping[str, str | Path],
    *,
    num_threads: int = 1,
    device: str = "cpu",
    verify: bool = False,
    progress: LoadProgress | None = None,
) -> Collection:
    """Load index folders by name; raises `IndexFolderError` (one line, with the fix) if one is not consistent.

    What is cheap to check is checked for every folder before the first encoder is loaded.
    """
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    opened = {name: _open_corpus(Path(folder), manifests[name], verify=verify) for name, folder in folders.items()}
    collection = Collection(corpora={})
    for name, manifest in manifests.items():
        if progress:
            progress(name, len(collection.corpora), len(manifests))
        folder, corpus = Path(folders[name]), opened[name]
        index: SearchIndex
        if manifest.method == "bm25":
            index = BM25Index.load(folder / manifest.index, num_passages=len(corpus))
        else:
            encoder = _shared_encoder(collection.encoders, manifest, folder, device=device, num_threads=num_threads)
            index = FaissFlatIndex.load(
                folder / manifest.index, encoder, num_passages=len(corpus), num_threads=num_threads
            )
            _probe(folder, index, encoder, corpus)
        collection.corpora[name] = ServedCorpus(folder, manifest, corpus, index)
    return collection


def _open_corpus(folder: Path, manifest: Manifest, *, verify: bool) -> Corpus:
    for part in (CORPUS_FILE, OFFSETS_FILE, manifest.index):
        if not (folder / part).exists():
            raise IndexFolderError(f"{folder} lacks {part}, which its manifest promises; build it again")
    offsets = np.load(folder / OFFSETS_FILE, mmap_mode="r", allow_pickle=False)
    try:
        corpus = Corpus(folder / CORPUS_FILE, offsets)
    except ValueError as error:
        raise IndexFolderError(str(error)) from None
    check_corpus(folder, manifest, len(corpus), verify=verify)
    return corpus


def _shared_encoder(
    encoders: dict[EncoderConfig, Encoder], manifest: Manifest, folder: Path, *, device: str, num_threads: int
) -> Encoder:
    if manifest.encoder is None:
        raise IndexFolderError(f"{folder} is a dense index without an encoder in its manifest; build it again")
    if manifest.encoder not in encoders:
        encoders[manifest.encoder] = load_encoder(manifest.encoder, device=device, num_threads=num_threads)
    return encoders[manifest.encoder]


def _probe(folder: Path, index: FaissFlatIndex, encoder: Encoder, corpus: Corpus) -> None:
    """Encode the first passage again: catches another model, prefix or pooling behind the same name."""
    cosine = float(encoder.encode_passages([corpus[0]["contents"]])[0] @ index.vector(0))
    if not cosine >= MIN_PROBE_COSINE:
        raise IndexFolderError(
            f"{folder}: the encoder does not reproduce the stored vector of passage 0 (cosine {cosine:.3f}, expected "
            f"at least {MIN_PROBE_COSINE}): the index was made by another encoder or prefix; build it again"
        )


def _to_hits(rows: np.ndarray, scores: np.ndarray) -> list[Hits]:
    """`[n, topk]` arrays as hits, without the fill of short answers."""
    return [
        Hits(tuple(row[row != NO_ROW].tolist()), tuple(score[row != NO_ROW].tolist()))
        for row, score in zip(rows, scores, strict=True)
    ]
