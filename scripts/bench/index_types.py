"""Compare index types and engines on one set of vectors: size, cost per query, recall; and what encoding costs.

python scripts/bench/index_types.py                                  # 100,000 x 384, minutes on one core
python scripts/bench/index_types.py --num-rows 50000 --dimension 768

CPU milliseconds of one thread, so that a busy machine does not change the verdict. The vectors are synthetic: unit
length, in clusters, all with a common part, as those of E5 (cosines of .7-.9); a query lies near a row.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

import numpy as np

TOPK, NUM_QUERIES = 3, 512
BATCH_SIZES = (1, 64, 512)
# Index type, engine, FAISS parameters
SETTINGS = [
    ("Flat", {"engine": "faiss"}),
    ("Flat", {"engine": "torch", "scan_dtype": "float32"}),
    ("Flat", {"engine": "torch", "scan_dtype": "bfloat16"}),
    ("SQfp16", {"engine": "torch", "scan_dtype": "bfloat16"}),
    ("SQ8", {"engine": "faiss"}),
    ("HNSW32", {"engine": "faiss", "search_params": "efSearch=128"}),
    ("HNSW32_SQ8", {"engine": "faiss", "search_params": "efSearch=64"}),
    ("HNSW32_SQ8", {"engine": "faiss", "search_params": "efSearch=128"}),
    ("HNSW32_SQ8", {"engine": "faiss", "search_params": "efSearch=256"}),
    ("HNSW32_SQ8,Refine(SQfp16)", {"engine": "faiss", "search_params": "efSearch=128"}),
    ("IVF256,SQ8", {"engine": "faiss", "search_params": "nprobe=32"}),
]
SYLLABLES = [left + right for left in "kgrvtmsdbnlp" for right in "aeiou"]


def make_vectors(num_rows: int, dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[num_rows, dimension]` and queries `[NUM_QUERIES, dimension]`."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / dimension**0.5

    common, centres = 1.5 * noise(dimension), 0.6 * noise(max(1, num_rows // 50), dimension)
    rows = common + centres[rng.integers(len(centres), size=num_rows)] + 0.5 * noise(num_rows, dimension)
    queries = rows[rng.choice(num_rows, NUM_QUERIES)] + 0.4 * noise(NUM_QUERIES, dimension)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), queries / np.linalg.norm(queries, axis=1, keepdims=True)


def cpu_ms(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e3


def least_ms(ask: Callable[[Any], object], queries: Any, size: int) -> float:
    """CPU ms per query in batches of `size`: the least of eight, after one that is not counted."""
    batches = [queries[start : start + size] for start in range(0, min(len(queries), 8 * size), size)]
    ask(batches[0])
    return min(cpu_ms(partial(ask, batch)) / len(batch) for batch in batches)


class NoEncoder:
    """Never asked: the queries are vectors."""


def measure(path: Path, index_type: str, choices: dict[str, Any], rows: np.ndarray, queries: np.ndarray) -> dict:
    """Size, build and search of one setting; recall against numpy's product."""
    from retriever.faiss_file import write_index
    from retriever.index import DenseIndex
    from retriever.scan import open_scan

    build_ms = float("nan")
    if not path.exists():
        build_ms = cpu_ms(
            lambda: write_index(
                path, index_type, lambda start, end: rows[start:end], num_rows=len(rows), dimension=rows.shape[1]
            )
        )
    scan, stored = open_scan(path, index_type, **choices)
    encoder: Any = NoEncoder()
    index = DenseIndex(scan, encoder, num_rows=len(rows), rows=stored)

    def search(batch: np.ndarray) -> np.ndarray:
        return index.search([""] * len(batch), TOPK, query_vectors=batch)[0]

    found = search(queries)
    row = {"MB": path.stat().st_size / 1e6, "build ms/row": build_ms / len(rows)}
    row |= {f"batch {size}": least_ms(search, queries, size) for size in BATCH_SIZES}
    exact = np.argpartition(-(queries @ rows.T), TOPK, axis=1)[:, :TOPK]
    row["recall@3"] = float(np.mean([len(set(a) & set(b)) / TOPK for a, b in zip(found, exact, strict=True)]))
    return row


def write_corpus(path: Path, *, num_passages: int, seed: int) -> list[str]:
    """Write passages of about 20 words with invented names, and return a question-like query for each."""
    import orjson

    rng = random.Random(seed)

    def name() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()

    words, queries = [name().lower() for _ in range(2000)], []
    with open(path, "wb") as file:
        for row in range(num_passages):
            title = name()
            contents = f'"{title}"\n{title} is a city in {name()}: {" ".join(rng.choices(words, k=12))}.'
            file.write(orjson.dumps({"id": str(row), "contents": contents}) + b"\n")
            queries.append(f"which country is the city {title} in")
    rng.shuffle(queries)
    return queries


def measure_text(encoder: str, root: Path, num_passages: int, seed: int) -> dict[str, dict[str, float]]:
    """CPU ms per passage and per query of an encoder, and of BM25 over the same passages."""
    from retriever.bm25 import BM25Index
    from retriever.corpus import Corpus
    from retriever.encoder_config import EncoderConfig
    from retriever.encoders import load_encoder

    queries = write_corpus(root / "corpus.jsonl", num_passages=num_passages, seed=seed)
    contents = [row["contents"] for row in Corpus(root / "corpus.jsonl")]
    model = load_encoder(EncoderConfig(spec=encoder), num_threads=1)
    model.encode_passages(contents[:64])
    encoding = {"passage": cpu_ms(lambda: model.encode_passages(contents)) / num_passages}
    words = {"passage": cpu_ms(lambda: BM25Index.write(root / "bm25", contents)) / num_passages}
    bm25 = BM25Index.load(root / "bm25", num_passages=num_passages)
    encoding |= {f"batch {size}": least_ms(model.encode_queries, queries, size) for size in BATCH_SIZES}
    words |= {f"batch {size}": least_ms(lambda batch: bm25.search(batch, TOPK), queries, size) for size in BATCH_SIZES}
    return {f"encode ({encoder})": encoding, "bm25": words}


def show(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    width = max(len(label) for label in rows) + 2
    print(f"{'':{width}}" + "".join(f"{column:>14}" for column in columns))
    for label, row in rows.items():
        print(f"{label:{width}}" + "".join(f"{row[column]:14.4g}" for column in columns), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rows", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--num-passages", type=int, default=2000, help="of the text part (default: %(default)s)")
    parser.add_argument("--encoder", default="minilm", help="encoder of the text part (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, queries = make_vectors(options.num_rows, options.dimension, options.seed)
        results = {}
        for index_type, choices in SETTINGS:
            label = " ".join([index_type, *choices.values()])
            print(f"measuring {label}", file=sys.stderr, flush=True)
            path = Path(folder) / f"{index_type.replace(',', '_')}.index"
            results[label] = measure(path, index_type, choices, rows, queries)
        print(
            f"{options.num_rows} x {options.dimension}, one thread; CPU ms per query at batch 1, 64, 512 (top {TOPK})"
        )
        show(results)
        print(f"\n{options.num_passages} passages of about 20 words; CPU ms per passage (build) and per query")
        show(measure_text(options.encoder, Path(folder), options.num_passages, options.seed))


if __name__ == "__main__":
    main()
