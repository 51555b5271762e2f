"""Stress our retrieval server: many clients that check each of their answers, then four times what its queue takes.

python scripts/bench/retriever_stress.py                 # 512 clients for 60 s, then 15 s of overload
python scripts/bench/retriever_stress.py --seconds 6 --overload-s 3 --num-passages 4000

Fails (exit status 1) on an error, a lost or swapped answer, memory that grows, a queue that refuses nothing under
overload, or a server that does not answer at once after it. Answers are checked against exact float32 search.
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import psutil
import uvloop
from retriever_data import NUM_PASSAGES, load_bench_encoder, make, query_text, vector_file
from retriever_load import LoadResult, http_request, run_load
from retriever_servers import end_servers_on_sigterm, started

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
HERE = Path(__file__).resolve().parent
MAX_TOPK = 5
NUM_QUERIES = 4096  # distinct ones; each is asked many times, so that the cache is under test too
QUEUE = 64
OVERLOAD = 4


@dataclass
class Checker:
    """Exact answers, and what the clients saw."""

    exact: list[list[str]]  # ids of the `MAX_TOPK` best passages by query number
    statuses: Counter[int] = field(default_factory=Counter)
    num_wrong: int = 0

    def check(self, numbers: tuple[int, ...], status: int, body: bytes) -> None:
        self.statuses[status] += 1
        if status != 200:
            return
        topk, return_scores = options_of(numbers)
        lists = orjson.loads(body)["result"]
        documents = [[hit["document"] if return_scores else hit for hit in hits] for hits in lists]
        ids = [[document["id"] for document in found] for found in documents]
        self.num_wrong += ids != [self.exact[number][:topk] for number in numbers]


def options_of(numbers: tuple[int, ...]) -> tuple[int, bool]:
    """topk and return_scores of a request: a mixture, given by its first query."""
    return 1 + numbers[0] % MAX_TOPK, numbers[0] % 2 == 0


def requests(url: str) -> Iterator[tuple[tuple[int, ...], bytes]]:
    rng = random.Random(0)
    while True:
        numbers = tuple(rng.randrange(NUM_QUERIES) for _ in range(rng.choice((1, 1, 1, 2, 5))))
        topk, return_scores = options_of(numbers)
        queries = [query_text(number) for number in numbers]
        yield numbers, http_request(url, queries, topk=topk, return_scores=return_scores)


def exact_answers(data: Path) -> list[list[str]]:
    encoder = load_bench_encoder("stub", data)
    vectors = np.load(vector_file(data, encoder.dimension))
    queries = encoder.encode_queries([query_text(number) for number in range(NUM_QUERIES)])
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :MAX_TOPK]
    return [[str(row) for row in rows] for rows in best.tolist()]


def steady(url: str, pid: int, checker: Checker, options: argparse.Namespace) -> tuple[LoadResult, float]:
    """Load for `options.seconds`, and the growth of resident memory after the first fifth."""
    process, seen = psutil.Process(pid), [0, 0]

    def note(position: int) -> None:
        seen[position] = process.memory_info().rss

    result = uvloop.run(
        run_load(
            url,
            requests(url),
            num_clients=options.clients,
            warm_up_s=options.seconds / 5,
            seconds=options.seconds * 4 / 5,
            num_kept=0,
            on_start=lambda: note(0),
            on_end=lambda: note(1),
            on_answer=checker.check,
        )
    )
    return result, seen[1] / seen[0] - 1


def overload(url: str, checker: Checker, options: argparse.Namespace) -> tuple[LoadResult, float]:
    """Four times as many clients as the queue takes, and the seconds that one request takes right after."""
    result = uvloop.run(
        run_load(
            url,
            requests(url),
            num_clients=OVERLOAD * QUEUE,
            warm_up_s=0.5,
            seconds=options.overload_s,
            num_kept=0,
            on_answer=checker.check,
        )
    )
    began = time.perf_counter()
    body = orjson.dumps({"query": query_text(NUM_QUERIES)})
    with DIRECT.open(urllib.request.Request(f"{url}/retrieve", body), timeout=60) as reply:
        reply.read()
    return result, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--overload-s", type=float, default=15)
    parser.add_argument("--num-passages", type=int, default=NUM_PASSAGES)
    parser.add_argument(
        "--max-growth", type=float, default=0.1, help="of the resident memory, from a fifth of the time to its end"
    )
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "retriever-bench")
    parser.add_argument("--server-args", default="", help="further arguments of retriever.serve")
    options = parser.parse_args()
    end_servers_on_sigterm()
    make("stub", options.data, num_passages=options.num_passages)
    exact = exact_answers(options.data)
    serve = [str(HERE / "retriever_data.py"), "serve", "stub", str(options.data), *shlex.split(options.server_args)]
    log = options.data / "stress.log"
    # A small cache fills up within the warm-up: what grows after it would be a leak.
    with started("steady", [*serve, "--cache-mb", "1"], "/ready", log) as target:
        assert target.pid is not None
        calm = Checker(exact)
        result, growth = steady(target.url, target.pid, calm, options)
    limits = ["--cache-mb", "0", "--max-waiting-queries", str(QUEUE), "--max-batch", "16"]
    with started("overload", [*serve, *limits], "/ready", log) as target:
        busy = Checker(exact)
        overloaded, recovery_s = overload(target.url, busy, options)
    report = {
        "clients": options.clients,
        "requests": calm.statuses.total(),
        "queries_per_s": round(result.num_answered / result.seconds),
        "errors": calm.statuses.total() - calm.statuses[200],
        "wrong": calm.num_wrong,
        "memory_growth": round(growth, 4),
        "overload_statuses": dict(busy.statuses),
        "overload_wrong": busy.num_wrong,
        "overload_queries_per_s": round(overloaded.num_answered / overloaded.seconds),
        "recovery_s": round(recovery_s, 3),
    }
    print(json.dumps(report))
    failures = [
        ("errors or lost answers", report["errors"]),
        ("swapped or wrong answers", calm.num_wrong + busy.num_wrong),
        ("memory grows", growth > options.max_growth),
        ("overload is not refused", not busy.statuses[503]),
        ("overload breaks more than it refuses", set(busy.statuses) - {200, 503}),
        ("overload starves everyone", not busy.statuses[200]),
        ("slow recovery", recovery_s > 1),
    ]
    if failed := [name for name, is_so in failures if is_so]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
