"""Recall of an approximate index: how many of the exact best passages it finds, and what a query costs.

python -m retriever.recall --index indexes/wiki-hnsw --exact indexes/wiki --queries questions.txt
python -m retriever.recall --index indexes/wiki-hnsw --exact indexes/wiki --search-params efSearch=64 \\
    --search-params efSearch=256

Prints a table, and writes it to recall.json beside the index. Without --queries it asks for the titles of passages
spread over the corpus, which is easier than what people ask: take real questions where you have them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from retriever.collection import open_corpus, open_dense
from retriever.command import Parser, device, run, whole_number
from retriever.corpus import Corpus
from retriever.encoder_config import check_device
from retriever.encoders import load_encoder
from retriever.errors import RetrieverError
from retriever.faiss_file import map_rows
from retriever.index import DenseIndex
from retriever.manifest import RECALL_FILE, Manifest, read_manifest
from retriever.options import MAX_THREADS, Engine, SearchOptions
from retriever.scan import NO_ROW

CUTOFFS = (1, 3, 10)
BATCH_SIZE = 64
SAME_SCORE = 1e-6


@dataclass(frozen=True)
class Measurement:
    """One row of the report."""

    search_params: str
    recall: dict[str, float]  # share of the exact best k that are among the found best k, mean over queries, by k
    ms_per_query_alone: float
    ms_per_query_in_batches: float  # wall time of the search without the encoder, in batches of `BATCH_SIZE`


def measure_recall(
    folder: Path,
    exact_folder: Path,
    queries: Sequence[str] | None = None,
    *,
    num_queries: int = 500,
    cutoffs: Sequence[int] = CUTOFFS,
    search_params: Sequence[str] = (),
    engine: Engine = "auto",
    device: str = "cpu",
    num_threads: int = 1,
) -> dict[str, Any]:
    """Compares `folder` with the exact index of the same corpus, and writes the report beside the index.

    Raises `RetrieverError` when the two folders do not hold the same corpus and encoder, or the reference is not
    exact.
    """
    manifest, exact_manifest = read_manifest(folder), read_manifest(exact_folder)
    if exact_manifest.index_type != "Flat":
        raise RetrieverError(f"{exact_folder} is a {exact_manifest.index_type} index; the reference must be Flat")
    if manifest.encoder is None or manifest.encoder != exact_manifest.encoder:
        raise RetrieverError(f"{folder} and {exact_folder} have different encoders; compare indexes of the same one")
    if manifest.corpus_sha256 != exact_manifest.corpus_sha256:
        raise RetrieverError(f"{folder} and {exact_folder} index different corpora; compare indexes of the same one")
    check_device(device)
    corpus = open_corpus(folder, manifest)
    open_corpus(exact_folder, exact_manifest)
    if queries is None:
        queries = title_queries(corpus, num_queries)
    encoder = load_encoder(manifest.encoder, device=device, num_threads=num_threads)
    vectors = encoder.encode_queries(list(queries))
    topk = min(max(cutoffs), len(corpus))

    def opened(where: Path, what: Manifest, params: str, **choices: Any) -> DenseIndex:
        options = SearchOptions(search_params=params, **choices)
        return open_dense(where, what, encoder, options, device=device, num_threads=num_threads)

    stored = map_rows(exact_folder / exact_manifest.index, exact_manifest.index_type)
    expected = exact_scores(vectors, _search(opened(exact_folder, exact_manifest, ""), vectors, topk), stored)
    rows = []
    for params in search_params or [manifest.search_params]:
        index = opened(folder, replace(manifest, search_params=params), params, engine=engine)
        found, alone_ms, batched_ms = _timed_search(index, vectors, topk)
        scores = exact_scores(vectors, found, stored)
        recall = {str(k): recall_at(scores, expected, min(k, topk)) for k in cutoffs}
        rows.append(Measurement(params, recall, alone_ms, batched_ms))
    report = {
        "index_type": manifest.index_type,
        "num_passages": manifest.num_passages,
        "index_bytes": manifest.files[manifest.index].bytes,
        "num_queries": len(queries),
        "batch_size": BATCH_SIZE,
        "num_threads": num_threads,
        "measurements": [vars(row) for row in rows],
    }
    (folder / RECALL_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return report


def recall_at(found_scores: np.ndarray, expected_scores: np.ndarray, k: int) -> float:
    """Mean share of the first `k` found that score at least as well as the exact `k`-th: equal passages count alike.

    Both `[n, topk]`, exact scores, `expected_scores` best first.
    """
    return round(float((found_scores[:, :k] >= expected_scores[:, k - 1 : k] - SAME_SCORE).mean()), 4)


def exact_scores(vectors: np.ndarray, rows: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Inner products `[n, topk]` of queries with the rows found for them; -inf for no row."""
    scores = np.matmul(stored[rows].astype(np.float32, copy=False), vectors[:, :, None])[:, :, 0]
    return np.where(rows == NO_ROW, -np.inf, scores)


def title_queries(corpus: Corpus, num_queries: int) -> list[str]:
    """First lines of passages that are spread over the corpus."""
    rows = np.unique(np.linspace(0, len(corpus) - 1, num_queries).astype(np.int64)).tolist()
    return [corpus[row]["contents"].split("\n", 1)[0].strip('" ') or "a" for row in rows]


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    rows = report["measurements"]
    cutoffs = list(rows[0]["recall"])
    width = max(12, *(len(row["search_params"]) for row in rows))
    lines = [
        f"{report['index_type']}, {report['num_passages']} passages, {report['index_bytes'] / 1e6:.0f} MB, "
        f"{report['num_queries']} queries, {report['num_threads']} threads",
        f"{'parameters':{width}}" + "".join(f"{f'recall@{k}':>12}" for k in cutoffs) + "   ms alone   ms in batches",
    ]
    for row in rows:
        recalls = "".join(f"{row['recall'][k]:12.4f}" for k in cutoffs)
        times = f"{row['ms_per_query_alone']:11.3f}{row['ms_per_query_in_batches']:16.3f}"
        lines.append(f"{row['search_params'] or '-':{width}}{recalls}{times}")
    return "\n".join(lines)


def _timed_search(index: DenseIndex, vectors: np.ndarray, topk: int) -> tuple[np.ndarray, float, float]:
    """Rows found `[n, topk]`, and milliseconds per query: one at a time, and in batches."""
    alone = vectors[:BATCH_SIZE]
    _search(index, alone, topk)  # what is read for the first time is not what a server costs
    started = time.perf_counter()
    found = _search(index, vectors, topk)
    batched_s = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(len(alone)):
        index.search([""], topk, query_vectors=alone[number : number + 1])
    alone_s = time.perf_counter() - started
    return found, round(alone_s / len(alone) * 1e3, 3), round(batched_s / len(vectors) * 1e3, 3)


def _search(index: DenseIndex, vectors: np.ndarray, topk: int) -> np.ndarray:
    """Rows found `[n, topk]`."""
    parts = [vectors[start : start + BATCH_SIZE] for start in range(0, len(vectors), BATCH_SIZE)]
    return np.concatenate([index.search([""] * len(part), topk, query_vectors=part)[0] for part in parts])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("recall", __doc__)
    parser.add_argument("--index", required=True, type=Path, help="index folder to measure")
    parser.add_argument("--exact", required=True, type=Path, help="Flat index folder of the same corpus")
    parser.add_argument("--queries", type=Path, help="text file, one query a line")
    parser.add_argument(
        "--num-queries", type=whole_number(1), default=500, help="without --queries (default: %(default)s)"
    )
    parser.add_argument("--k", type=whole_number(1), nargs="+", default=list(CUTOFFS), help="default: 1 3 10")
    parser.add_argument(
        "--search-params", action="append", default=[], help="e.g. efSearch=128; repeat it for a row each"
    )
    parser.add_argument(
        "--engine", choices=get_args(Engine), default=SearchOptions().engine, help="as of retriever.serve"
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--num-threads", type=whole_number(1, MAX_THREADS), default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    run("recall", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    report = measure_recall(
        options.index,
        options.exact,
        read_queries(options.queries) if options.queries else None,
        num_queries=options.num_queries,
        cutoffs=options.k,
        search_params=options.search_params,
        engine=options.engine,
        device=options.device,
        num_threads=options.num_threads,
    )
    print(table(report))


def read_queries(path: Path) -> list[str]:
    """The lines of a text file that are not blank; raises `RetrieverError` when there is none."""
    try:
        queries = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise RetrieverError(f"--queries {path} is not text in UTF-8 ({error})") from None
    if not queries:
        raise RetrieverError(f"--queries {path} holds no query; expected one a line")
    return queries


if __name__ == "__main__":
    main()
