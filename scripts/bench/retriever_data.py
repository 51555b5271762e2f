"""Synthetic corpus, index and encoders for the retrieval benchmarks, and our server on them.

python scripts/bench/retriever_data.py make stub DATA       # corpus and index of 50,000 x 768
python scripts/bench/retriever_data.py serve stub DATA ...  # our server; further arguments are retriever.serve's

Encoders: `stub` looks queries up (768 dimensions), so that a run measures everything else; `minilm` runs the real
model on queries (384 dimensions). Passages have random unit vectors with both: nothing is easier to find than among
real ones, where neighbours are closer together.
"""

import importlib
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

NUM_PASSAGES = 50_000
DIMENSIONS = {"stub": 768, "minilm": 384}
NUM_BASE_QUERIES = 4096
WORDS = re.findall(
    r"\w+",
    "the of in a and to was is for on as by with first city river king wrote novel film born country team season album "
    "year university founded capital language located people world war series known district member",
)


class StubEncoder:
    """Vectors by the number in a text: `p12` is a row of the index, `q7` one of endless distinct queries."""

    def __init__(self, data: Path, dimension: int) -> None:
        self.dimension = dimension
        self.num_truncated = 0
        self._passages = np.load(vector_file(data, dimension), mmap_mode="r")
        rng = np.random.default_rng(1)
        self._base = rng.standard_normal((NUM_BASE_QUERIES, dimension), dtype=np.float32)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        numbers = np.array([int(text[1 : text.index(" ")]) for text in texts], dtype=np.int64)
        first, second = numbers % NUM_BASE_QUERIES, (numbers * 13 + numbers // NUM_BASE_QUERIES * 7 + 1)
        vectors = self._base[first] + self._base[second % NUM_BASE_QUERIES]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        rows = [int(match.group(1)) for text in texts if (match := re.search(r"p(\d+)", text))]
        return np.array(self._passages[rows])


class RealQueryEncoder(StubEncoder):
    """MiniLM for queries, random vectors for passages."""

    def __init__(self, data: Path, dimension: int, **arguments: Any) -> None:
        from retriever.encoders import EncoderConfig, load_encoder

        super().__init__(data, dimension)
        self._model = load_encoder(EncoderConfig(spec="minilm"), **arguments)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.encode_queries(list(texts))


def load_bench_encoder(kind: str, data: Path, **arguments: Any) -> StubEncoder:
    if kind == "stub":
        return StubEncoder(data, DIMENSIONS[kind])
    return RealQueryEncoder(data, DIMENSIONS[kind], **arguments)


_rng = random.Random(0)
PHRASES = [" ".join(_rng.choices(WORDS, k=_rng.randint(5, 15))) for _ in range(1009)]


def query_text(number: int) -> str:
    """A query of 6-16 words, the same for the same number."""
    return f"q{number} {PHRASES[number % len(PHRASES)]}"


def vector_file(data: Path, dimension: int) -> Path:
    return data / f"vectors-{dimension}.npy"


def index_folder(data: Path, kind: str) -> Path:
    return data / f"index-{kind}"


def index_file(data: Path, kind: str) -> Path:
    """The FAISS file of an index folder."""
    folder = index_folder(data, kind)
    return folder / json.loads((folder / "manifest.json").read_text())["index"]


def make(kind: str, data: Path, *, num_passages: int = NUM_PASSAGES) -> None:
    """Writes corpus, vectors and index, unless they are there."""
    data.mkdir(parents=True, exist_ok=True)
    dimension = DIMENSIONS[kind]
    if not (data / "corpus.jsonl").exists():
        rng = random.Random(0)
        with open(data / "corpus.jsonl", "w") as file:
            for row in range(num_passages):
                contents = f'"p{row}"\n' + " ".join(rng.choices(WORDS, k=100))
                file.write(json.dumps({"id": str(row), "contents": contents}) + "\n")
    if not vector_file(data, dimension).exists():
        vectors = np.random.default_rng(0).standard_normal((num_passages, dimension), dtype=np.float32)
        np.save(vector_file(data, dimension), vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    if not index_folder(data, kind).exists():
        from retriever.build import build_indexes

        use_bench_encoder(kind, data)
        build_indexes({f"index-{kind}": data / "corpus.jsonl"}, data, "minilm")


def use_bench_encoder(kind: str, data: Path) -> None:
    """Lets the retriever's modules load the benchmark's encoder, whatever a manifest names."""
    for part in ("build", "collection"):
        importlib.import_module(f"retriever.{part}")
    model = None

    def load(*_: Any, device: str = "cpu", num_threads: int | None = None, **__: Any) -> StubEncoder:
        nonlocal model
        model = model or load_bench_encoder(kind, data, device=device, num_threads=num_threads)
        return model

    for name, module in list(sys.modules.items()):
        if name.startswith("retriever.") and name != "retriever.encoders" and hasattr(module, "load_encoder"):
            setattr(module, "load_encoder", load)  # noqa: B010


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[1] not in ("make", "serve") or sys.argv[2] not in DIMENSIONS:
        sys.exit(__doc__)
    action, kind, data = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    make(kind, data)
    if action == "serve":
        from retriever.serve import main as serve

        use_bench_encoder(kind, data)
        serve([f"--index=bench={index_folder(data, kind)}", *sys.argv[4:]])


if __name__ == "__main__":
    main()
