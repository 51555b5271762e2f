"""A small corpus, its real indexes, and a real server process on a free port."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn

from retriever.app import create_app
from retriever.build import build_indexes
from retriever.collection import Collection, Hits, SearchJob
from retriever.encoder_config import resolve_dtype
from retriever.options import ServerLimits
from retriever.service import Service

ROOT = Path(__file__).resolve().parents[2]
STARTUP_TIMEOUT_S = 120

FACTS = {
    "Lyon": "Lyon is a city in France on the river Rhone.",
    "Osaka": "Osaka is a port city in Japan known for its castle.",
    "Photosynthesis": "Plants turn sunlight, water and carbon dioxide into sugar.",
    "Mount Everest": "The highest mountain on Earth lies in the Himalayas.",
    "Penicillin": "An antibiotic discovered by Alexander Fleming in 1928.",
    "Moby-Dick": "A novel by Herman Melville about a captain who hunts a white whale.",
    "Violin": "A string instrument with four strings, played with a bow.",
    "Saturn": "The sixth planet from the Sun, famous for its rings.",
    "Bitcoin": "A digital currency that runs on a public ledger.",
    "Chess": "A board game for two players with kings and queens.",
    "Espresso": "Strong coffee made by pressing hot water through ground beans.",
    "Kangaroo": "A marsupial from Australia that hops and carries its young in a pouch.",
}
QUESTIONS = {
    "Which antibiotic did Fleming discover?": "Penicillin",
    "planet with rings": "Saturn",
    "Who hunts the white whale?": "Moby-Dick",
    "city in Japan": "Osaka",
    "how do plants make sugar": "Photosynthesis",
    "Australian animal with a pouch": "Kangaroo",
}


def last_bits(dtype: str = "auto") -> float:
    """What the batch may change in a number of a unit vector: in bfloat16 nothing without matrix tiles (AMX)."""
    if resolve_dtype(dtype, "cpu") == "float32":
        return 1e-6
    return 5e-3 if torch.cpu.get_capabilities().get("amx_bf16") else 0


def write_corpus(path: Path, facts: dict[str, str]) -> Path:
    rows = [{"id": str(row), "contents": f'"{title}"\n{text}'} for row, (title, text) in enumerate(facts.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class WordHashEncoder:
    """A stand-in that keeps the interface: unit vectors of hashed word counts; records what it encoded."""

    dimension = 64

    def __init__(self) -> None:
        self.num_truncated = 0
        self.passages: list[str] = []

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        self.passages += texts
        return self.encode_queries(texts)


@pytest.fixture
def word_hash_encoder(monkeypatch: pytest.MonkeyPatch) -> WordHashEncoder:
    """Builder and loader use this one encoder, whatever they are asked for."""
    encoder = WordHashEncoder()
    for module in ("build", "collection", "recall"):
        monkeypatch.setattr(f"retriever.{module}.load_encoder", lambda *_, **__: encoder)
    monkeypatch.setattr("retriever.build.require_encoder", lambda _: None)
    return encoder


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def post(url: str, body: Any, **headers: str) -> Reply:
    """POST json (or raw bytes); an HTTP error is a reply like any other."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
            return Reply(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, dict(error.headers), error.read())


def get(url: str, **headers: str) -> Reply:
    """GET; an HTTP error is a reply like any other."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            return Reply(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, dict(error.headers), error.read())


def metrics(url: str) -> dict[str, float]:
    """The server's counters; those with labels are named `name{label="value"}`."""
    lines = get(url + "/metrics").body.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"retriever.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STARTUP_TIMEOUT_S)


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]


class HeldCollection(Collection):
    """Real corpora behind a search that waits for `release` and notes what it is asked."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection.corpora, collection.encoders)
        self.started, self.release = threading.Event(), threading.Event()
        self.searched: list[str] = []

    def search(self, jobs: Sequence[SearchJob]) -> list[list[Hits]]:
        self.searched += [query for job in jobs for query in job.queries]
        self.started.set()
        assert self.release.wait(30)
        return super().search(jobs)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The real application on a free port, in a thread of this process."""
    timeout_s = service.limits.drain_s
    config = uvicorn.Config(create_app(service), port=0, log_level="warning", timeout_graceful_shutdown=timeout_s)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served_here(collection: Collection, *, limits: ServerLimits, token: str | None = None) -> Iterator[str]:
    """A loaded collection, once it is served; its first corpus is the default."""
    names = list(collection.corpora)
    service = Service(lambda _: collection, names=names, default=names[0], limits=limits, token=token)
    with serving(service) as url:
        while not service.ready:
            time.sleep(0.01)
        yield url


@contextmanager
def started_server(port_file: Path, *arguments: str, wait: bool = True) -> Iterator[Server]:
    """`python -m retriever.serve` on a free port, until the block ends; without `wait` it has no url yet."""
    command = [sys.executable, "-m", "retriever.serve", "--port", "0", "--port-file", str(port_file), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while wait and not port_file.exists():
            assert process.poll() is None, f"the server ended with {process.returncode} before it was ready"
            assert time.monotonic() < deadline, f"no port file after {STARTUP_TIMEOUT_S} s"
            time.sleep(0.02)
        yield Server(f"http://127.0.0.1:{port_file.read_text().strip() if wait else 0}", process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real MiniLM indexes `facts` and `cities`, and `words`, BM25 over the facts."""
    root = tmp_path_factory.mktemp("indexes")
    facts = write_corpus(root / "facts.jsonl", FACTS)
    cities = write_corpus(root / "cities.jsonl", {"Kobe": "Kobe is a city in Japan.", "Lyon": FACTS["Lyon"]})
    folders = build_indexes({"facts": facts, "cities": cities}, root, "minilm")
    return folders | build_indexes({"words": facts}, root, method="bm25")


@pytest.fixture(scope="session")
def server(indexes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [f"--index={name}={folder}" for name, folder in indexes.items()]
    limits = ["--max-queries", "600", "--max-query-chars", "1000", "--max-topk", "20", "--max-body-bytes", "100000"]
    port_file = tmp_path_factory.mktemp("server") / "port"
    with started_server(port_file, *arguments, *limits, "--default", "facts") as running:
        yield running


@pytest.fixture(scope="session")
def retrieve(server: Server) -> Callable[..., Reply]:
    def ask(body: Any, corpus: str | None = None) -> Reply:
        return post(server.url + (f"/corpora/{corpus}" if corpus else "") + "/retrieve", body)

    return ask
