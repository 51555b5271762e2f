"""Time dense retrieval against BM25 on passages like the tiny world's: per passage built, per query searched.

python scripts/bench/retrieval.py            # under a minute on one core

CPU milliseconds of one thread, so that a busy machine does not change the verdict; the ratio is dense / BM25.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

SYLLABLES = [left + right for left in "kgrvtmsdbnlp" for right in "aeiou"]
BATCH_SIZES = (1, 8, 64)


def write_corpus(path: Path, *, num_passages: int, seed: int) -> list[str]:
    """Write passages of 10-25 tokens with invented names, and return one question-like query for each."""
    rng = random.Random(seed)

    def name() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()

    countries = [name() for _ in range(200)]
    queries = []
    with open(path, "w") as file:
        for row in range(num_passages):
            title, country = name(), rng.choice(countries)
            text = f"{title} : a city in {country} ."
            if row % 6 == 0:
                text = f"{title} : capital {name()} , currency {name()} , language {name()} , code {row} ."
            file.write(json.dumps({"id": str(row), "contents": f'"{title}"\n{text}'}) + "\n")
            queries.append(f"{title} capital" if row % 6 == 0 else f"C city {title}")
    rng.shuffle(queries)
    return queries


def cpu_ms(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e3


def time_method(method: str, encoder: str, corpus: Path, root: Path, queries: list[str]) -> dict[str, float]:
    """CPU ms per passage (build) and per query at each batch size (median), and seconds to load the libraries."""
    from retriever.build import build_indexes
    from retriever.collection import load_collection

    with open(corpus) as lines:
        num_passages = sum(1 for _ in lines)
    tiny = root / "one.jsonl"
    tiny.write_text('{"id": "0", "contents": "\\"A\\"\\nwarm up"}\n')
    start_ms = cpu_ms(lambda: build_indexes({f"{method}-start": tiny}, root, encoder, method))
    again_ms = cpu_ms(lambda: build_indexes({f"{method}-again": tiny}, root, encoder, method))
    build_ms = cpu_ms(lambda: build_indexes({method: corpus}, root, encoder, method))
    index = load_collection({method: root / method}).corpora[method].index
    row = {"passage": (build_ms - again_ms) / num_passages, "start": start_ms / 1e3}
    for size in BATCH_SIZES:
        batches = [queries[start : start + size] for start in range(0, min(len(queries), 12 * size), size)]
        index.search(batches[0], 3)
        row[f"batch {size}"] = statistics.median(
            cpu_ms(lambda batch=batch: index.search(batch, 3)) / len(batch) for batch in batches
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-passages", type=int, default=2000)
    parser.add_argument("--encoder", default="minilm", help="encoder spec of the dense index (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = root / "corpus.jsonl"
        queries = write_corpus(corpus, num_passages=options.num_passages, seed=options.seed)
        rows = {
            f"dense ({options.encoder})": time_method("dense", options.encoder, corpus, root, queries),
            "bm25": time_method("bm25", options.encoder, corpus, root, queries),
        }
    dense, bm25 = rows.values()
    rows["ratio"] = {column: dense[column] / bm25[column] for column in dense}
    print(f"{options.num_passages} passages, one thread; CPU ms per passage and per query (top 3); start in CPU s")
    print(f"{'':18}" + "".join(f"{column:>12}" for column in dense))
    for label, row in rows.items():
        print(f"{label:18}" + "".join(f"{value:12.3f}" for value in row.values()))


if __name__ == "__main__":
    main()
