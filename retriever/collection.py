"""Named corpora served together: one encoder instance per configuration, one encoding pass per batch of queries."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retriever.bm25 import BM25Index
from retriever.corpus import Corpus, read_offsets, scan_offsets, write_offsets
from retriever.encoder_config import EncoderConfig, check_device
from retriever.encoders import Encoder, load_encoder
from retriever.errors import RetrieverError
from retriever.faiss_file import ROW_DTYPES, file_type, read_header, refuse_non_finite, row_reader
from retriever.index import DenseIndex, SearchIndex
from retriever.manifest import (
    CORPUS_FILE,
    OFFSETS_FILE,
    PROBE_FILE,
    Manifest,
    check_files,
    probe_rows,
    read_manifest,
)
from retriever.options import SearchOptions
from retriever.rerank import RerankedIndex, Reranker
from retriever.scan import NO_ROW, open_scan

logger = logging.getLogger(__name__)

# bfloat16 on another processor moves a vector by about 1e-4; a wrong prefix or model by far more than this.
MIN_PROBE_COSINE = 0.99
# Vectors that come from a product quantiser have lost more
MIN_PROBE_COSINE_OF_PQ = 0.7
MAX_PROBES = 64
# Where all passages have cosines like that, their order still tells: no probe is nearer to another's vector than this
MAX_PROBE_EXCESS = 0.001


# Called with the corpus that is loaded next, the number of corpora loaded, and of all
LoadProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Hits:
    """One query's answer: rows of its corpus and their scores, best first."""

    rows: tuple[int, ...]
    scores: tuple[float, ...]


UNSEARCHABLE = Hits((), ())  # the answer, told by its identity, to a query whose vector is not finite


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
    stamps: Mapping[Path, tuple[int, int, int]]  # inode, size and time of change of what is mapped, when it was loaded

    def check_unchanged(self) -> None:
        """Raises `RetrieverError` when a file was rewritten in place, on which what is mapped is no longer the index.

        One that was replaced, as `--overwrite` does it, stays as it is for those who have it open.
        """
        for path, (inode, *rest) in self.stamps.items():
            with suppress(FileNotFoundError):
                status = path.stat()
                if status.st_ino == inode and [status.st_size, status.st_mtime_ns] != rest:
                    raise RetrieverError(
                        f"{path} was rewritten while it is served: its answers would be wrong; restart the server"
                    )


@dataclass
class Collection:
    """Loaded corpora by name. `search` belongs to one thread: GPU indexes and encoder counters are not thread-safe."""

    corpora: dict[str, ServedCorpus]
    encoders: dict[EncoderConfig, Encoder] = field(default_factory=dict)

    def search(self, jobs: Sequence[SearchJob]) -> list[list[Hits]]:
        """The hits of every query of every job, in order; `UNSEARCHABLE` where the encoder fails on a query.

        Raises:
            RetrieverError: a file of one of these corpora was rewritten.
        """
        for name in {job.corpus for job in jobs}:
            self.corpora[name].check_unchanged()
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
            found = _search_finite(index, queries, topk, query_vectors)
            for number in numbers:
                answers[number] = [next(found) for _ in jobs[number].queries]
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
    options: SearchOptions | None = None,
    progress: LoadProgress | None = None,
) -> Collection:
    """Loads index folders by name; raises `RetrieverError` (one line, with the fix) if one is not consistent.

    What is cheap to check is checked for every folder before the first encoder is loaded, and encoders before the
    first index is.
    """
    options = options or SearchOptions()
    check_device(device)
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    _check_read(options, manifests)
    opened = {name: open_corpus(Path(folder), manifests[name], verify=verify) for name, folder in folders.items()}
    stamps = {name: _stamps(Path(folder), manifests[name]) for name, folder in folders.items()}
    encoders: dict[EncoderConfig, Encoder] = {}
    for name, manifest in manifests.items():
        config = manifest.encoder
        if config is None:
            continue
        if config not in encoders:
            encoders[config] = load_encoder(
                config, device=device, num_threads=num_threads, trust_remote_code=options.trust_remote_code
            )
        _check_encoder(Path(folders[name]), manifest, encoders[config], opened[name])
    reranker = (
        Reranker(options.reranker, device=device, trust_remote_code=options.trust_remote_code)
        if options.reranker
        else None
    )
    collection = Collection({}, encoders)
    for name, manifest in manifests.items():
        if progress:
            progress(name, len(collection.corpora), len(manifests))
        folder, corpus = Path(folders[name]), opened[name]
        index: SearchIndex
        if manifest.encoder is None:
            index = BM25Index.load(folder / manifest.index, num_passages=len(corpus))
        else:
            index = open_dense(
                folder, manifest, encoders[manifest.encoder], options, device=device, num_threads=num_threads
            )
        if reranker:
            index = RerankedIndex(index, reranker, corpus, num_candidates=options.num_reranked)
        collection.corpora[name] = ServedCorpus(folder, manifest, corpus, index, stamps[name])
    return collection


def _check_read(options: SearchOptions, manifests: Mapping[str, Manifest]) -> None:
    """Raises `RetrieverError` for options that no served index reads."""
    dense = [manifest for manifest in manifests.values() if manifest.method == "dense"]
    readers = {"search_params": [each for each in dense if each.index_type not in ROW_DTYPES]}
    for name in ("engine", "scan_dtype", "num_candidates", "search_params"):
        value = getattr(options, name)
        if value != getattr(SearchOptions(), name) and not readers.get(name, dense):
            kinds = ", ".join(f"{each} ({manifest.index_type})" for each, manifest in manifests.items())
            raise RetrieverError(f"--{name.replace('_', '-')} {value}: no index here reads it, {kinds}; leave it out")


def _stamps(folder: Path, manifest: Manifest) -> dict[Path, tuple[int, int, int]]:
    statuses = {folder / name: (folder / name).stat() for name in manifest.files if name != PROBE_FILE}
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


def open_corpus(folder: Path, manifest: Manifest, *, verify: bool = False) -> Corpus:
    """The corpus of an index folder, after all the checks that need neither encoder nor index."""
    if manifest.method == "dense":
        _check_header(folder, manifest)
        _check_kind(folder, manifest)
    check_files(folder, manifest, verify=verify)
    path, table = folder / CORPUS_FILE, folder / OFFSETS_FILE
    offsets = read_offsets(table, path)
    if offsets is None:
        logger.warning("%s is absent or of another file; it is made again", table)
        offsets = scan_offsets(path)
        with suppress(OSError):  # a folder that we may only read
            write_offsets(table, offsets)
    if len(offsets) - 1 != manifest.num_passages:
        raise RetrieverError(
            f"{path} has {len(offsets) - 1} passages, the index was built from {manifest.num_passages}; build it again"
        )
    return Corpus(path, offsets)


def open_dense(
    folder: Path, manifest: Manifest, encoder: Encoder, options: SearchOptions, *, device: str, num_threads: int
) -> DenseIndex:
    """The index of a dense folder whose files were checked; exact rows, where it has them, score the best again."""
    exact = manifest.index_type in ROW_DTYPES
    if exact and not manifest.is_finite:  # made before this was looked at
        read_rows = row_reader(folder / manifest.index, manifest.index_type)
        refuse_non_finite(read_rows, manifest.num_passages, manifest.dimension or 0, folder / manifest.index)
    scan, rows = open_scan(
        folder / manifest.index,
        manifest.index_type,
        engine=options.engine,
        device=device,
        scan_dtype=options.scan_dtype,
        num_threads=num_threads,
        search_params="" if exact else options.search_params or manifest.search_params,
    )
    return DenseIndex(scan, encoder, num_rows=manifest.num_passages, rows=rows, num_candidates=options.num_candidates)


def _check_header(folder: Path, manifest: Manifest) -> None:
    path = folder / manifest.index
    if not path.is_file():
        raise RetrieverError(f"{folder} lacks {manifest.index}, which its manifest promises; build it again")
    header = read_header(path)
    if header.num_rows != manifest.num_passages:
        raise RetrieverError(
            f"{path} holds {header.num_rows} vectors, the corpus has {manifest.num_passages} passages; build it again"
        )
    if header.dimension != manifest.dimension:
        raise RetrieverError(
            f"{path} holds vectors of {header.dimension} dimensions, its manifest was written for "
            f"{manifest.dimension}; build it again"
        )


def _check_kind(folder: Path, manifest: Manifest) -> None:
    """Rows are read where they are said to lie, so a file that is something else must not pass for them."""
    if manifest.index_type in ROW_DTYPES and (kind := file_type(folder / manifest.index)) != manifest.index_type:
        raise RetrieverError(
            f"{folder / manifest.index} is a {kind} index, its manifest says {manifest.index_type}; convert it again"
        )


def _check_encoder(folder: Path, manifest: Manifest, encoder: Encoder, corpus: Corpus) -> None:
    """Encodes a few passages again: catches another model, prefix or pooling behind the same name."""
    if encoder.dimension != manifest.dimension:
        raise RetrieverError(
            f"{folder} holds vectors of {manifest.dimension} dimensions, the encoder makes {encoder.dimension}; "
            "build it again with this encoder, or serve it with the encoder that it was built with"
        )
    probes = _read_probes(folder / PROBE_FILE, encoder.dimension)
    rows = probe_rows(len(corpus), len(probes))
    if len(rows) != len(probes):
        raise RetrieverError(f"{folder} has {len(probes)} probes for {len(rows)} passages; build it again")
    again = encoder.encode_passages([corpus[row]["contents"] for row in rows])
    cosines = _unit(again) @ _unit(probes).T  # [encoded, stored]: whatever length an index gave its vectors
    own = cosines.diagonal()
    worst = int(own.argmin())
    least = MIN_PROBE_COSINE_OF_PQ if "PQ" in manifest.index_type else MIN_PROBE_COSINE
    if not own[worst] >= least:
        raise RetrieverError(
            f"{folder}: the encoder does not reproduce the stored vector of passage {rows[worst]} (cosine "
            f"{own[worst]:.3f}, expected at least {least}): the index was made by another encoder or "
            "prefix; build it again"
        )
    nearest = cosines.argmax(axis=1)
    lost = np.flatnonzero(cosines.max(axis=1) > own + MAX_PROBE_EXCESS)
    if len(lost):
        raise RetrieverError(
            f"{folder}: passage {rows[lost[0]]} is nearer to that of passage {rows[nearest[lost[0]]]} than to its own "
            "vector: corpus and index are in different orders, or of another encoder; build it again"
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _read_probes(path: Path, dimension: int) -> np.ndarray:
    try:
        probes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more is allocated than the file holds
    except (OSError, ValueError, EOFError) as error:
        raise RetrieverError(f"{path} cannot be read ({error}); copy it again, or build it again") from None
    fits = probes.ndim == 2 and probes.shape[1] == dimension and 0 < len(probes) <= MAX_PROBES
    if not fits or probes.dtype != np.float32:
        raise RetrieverError(
            f"{path} holds {probes.dtype} {probes.shape}; expected float32 (rows, {dimension}): build it again"
        )
    return probes


def _search_finite(index: SearchIndex, queries: Sequence[str], topk: int, vectors: np.ndarray | None) -> Iterator[Hits]:
    """The hits of each query; one whose vector is not finite is left out of the search, and takes nobody with it."""
    if vectors is None:
        return iter(_to_hits(*index.search(queries, topk)))
    finite = np.isfinite(vectors).all(axis=1)
    if finite.all():
        return iter(_to_hits(*index.search(queries, topk, query_vectors=vectors)))
    logger.warning("the encoder gives %d of %d queries a vector that is not finite", (~finite).sum(), len(queries))
    good = [query for query, is_good in zip(queries, finite, strict=True) if is_good]
    hits = iter(_to_hits(*index.search(good, topk, query_vectors=vectors[finite])) if good else ())
    return (next(hits) if is_good else UNSEARCHABLE for is_good in finite)


def _to_hits(rows: np.ndarray, scores: np.ndarray) -> list[Hits]:
    """`[n, topk]` arrays as hits, without the fill of short answers."""
    found = (rows != NO_ROW) & np.isfinite(scores)
    return [
        Hits(tuple(row[mine].tolist()), tuple(score[mine].tolist()))
        for row, score, mine in zip(rows, scores, found, strict=True)
    ]
