"""Measure retrieval servers of Search-R1's protocol against each other, in one interleaved run.

python scripts/bench/retrieval.py                          # ours against the reference server; about 10 minutes
python scripts/bench/retrieval.py --loads 64x1 --rounds 1  # a quick look
python scripts/bench/retrieval.py --url other=http://127.0.0.1:8001@4711
                                   # also a server of your own on the data of retriever_data.py; @pid for its CPU time

Every round gives every server the same load in turn, so that what else the machine does meets all of them; the ratios
are medians over rounds. Recall@3 is against exact float32 search with the same encoder.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
import psutil
import uvloop
from retriever_data import StubEncoder, load_bench_encoder, make, query_text, vector_file
from retriever_load import LoadResult, http_request, run_load
from retriever_servers import Target, end_servers_on_sigterm, started

HERE = Path(__file__).resolve().parent
TOPK = 3
SERVER_ARGS = f"--engine torch --num-threads {os.cpu_count()}"  # all cores, as the reference takes
NUM_CHECKED = 256  # answers per turn that are compared with exact search


@dataclass(frozen=True)
class Load:
    name: str
    encoder: str
    num_clients: int
    queries_per_request: int
    repeated_share: float = 0.0
    servers: tuple[str, ...] = ("ours", "default", "best")


LOADS = (
    Load("64x1", "stub", 64, 1),
    Load("256x1", "stub", 256, 1),
    Load("1x512", "stub", 1, 512),
    Load("64x1-minilm", "minilm", 64, 1),
    Load("64x1-minilm-repeated", "minilm", 64, 1, 0.5, ("cached", "ours")),
)


@dataclass(frozen=True)
class Turn:
    """One server under one load in one round."""

    load: str
    server: str
    qps: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cpu_ms: float  # processor time of the server's process tree, per query
    num_errors: int
    recall: float
    load_average: float  # the machine's over the last minute: how much else it had to do


class Questions:
    """Endless requests of queries that no server has seen, but for a share that repeats earlier ones of this turn."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._rng = random.Random(0)

    def requests(self, url: str, load: Load) -> Iterator[tuple[tuple[int, ...], bytes]]:
        asked: list[int] = []
        while True:
            numbers = []
            for _ in range(load.queries_per_request):
                repeat = asked and self._rng.random() < load.repeated_share
                number = self._rng.choice(asked) if repeat else next(self._numbers)
                if load.repeated_share:
                    asked.append(number)
                numbers.append(number)
            yield tuple(numbers), http_request(url, [query_text(number) for number in numbers], topk=TOPK)


class CpuClock:
    """CPU seconds of a process tree; NaN without a process."""

    def __init__(self, pid: int | None) -> None:
        self._process = psutil.Process(pid) if pid else None
        self.seconds = float("nan")

    def start(self) -> None:
        self._started = self._read()

    def stop(self) -> None:
        self.seconds = self._read() - self._started

    def _read(self) -> float:
        if self._process is None:
            return float("nan")
        times = [process.cpu_times() for process in (self._process, *self._process.children(recursive=True))]
        return sum(one.user + one.system for one in times)


class Judge:
    """Recall@3 of answers against exact search."""

    def __init__(self, data: Path, encoder: str) -> None:
        self._encoder: StubEncoder = load_bench_encoder(encoder, data)
        self._vectors = np.load(vector_file(data, self._encoder.dimension))

    def recall(self, result: LoadResult) -> float:
        pairs = [
            (number, [hit["document"]["id"] for hit in hits])
            for numbers, body in result.answers
            for number, hits in zip(numbers, orjson.loads(body)["result"], strict=True)
        ][:NUM_CHECKED]
        if not pairs:
            return float("nan")
        queries = self._encoder.encode_queries([query_text(number) for number, _ in pairs])
        exact = np.argsort(-(queries @ self._vectors.T), axis=1)[:, :TOPK]
        found = [
            len({str(row) for row in rows} & set(answer))
            for rows, (_, answer) in zip(exact.tolist(), pairs, strict=True)
        ]
        return sum(found) / (TOPK * len(pairs))


def run_turn(load: Load, target: Target, questions: Questions, judge: Judge, options: argparse.Namespace) -> Turn:
    clock = CpuClock(target.pid)
    result = uvloop.run(
        run_load(
            target.url,
            questions.requests(target.url, load),
            num_clients=load.num_clients,
            warm_up_s=options.warm_up_s,
            seconds=options.seconds,
            num_kept=max(1, NUM_CHECKED // load.queries_per_request),
            on_start=clock.start,
            on_end=clock.stop,
        )
    )
    latencies = np.array(result.latencies_s or [float("nan")]) * 1e3
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist()
    answered = result.num_answered
    cpu_ms = clock.seconds * 1e3 / answered if answered else float("nan")
    return Turn(
        load.name,
        target.name,
        answered / result.seconds,
        p50,
        p95,
        p99,
        cpu_ms,
        result.num_errors,
        judge.recall(result),
        os.getloadavg()[0],
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("inf")


def start_servers(stack: ExitStack, encoder: str, names: set[str], options: argparse.Namespace) -> list[Target]:
    """The servers of one encoder that its loads ask for: ours without and with its cache, the reference twice."""
    ours = [str(HERE / "retriever_data.py"), "serve", encoder, str(options.data), *shlex.split(options.server_args)]
    reference = [str(HERE / "reference_retriever.py"), "--data", str(options.data), "--encoder", encoder]
    commands = {
        "ours": ([*ours, "--cache-mb", "0"], "/ready"),
        "cached": (ours, "/ready"),
        "default": (reference, "/health"),
        "best": ([*reference, "--num-threads", "1"], "/health"),
    }
    targets = [
        stack.enter_context(started(f"{name} ({encoder})", *commands[name], options.data / f"{name}-{encoder}.log"))
        for name in sorted(names)
    ]
    return [Target(target.name.split()[0], target.url, target.pid) for target in targets]


def other_target(text: str) -> Target:
    """`name=http://host:port@pid`, the pid left out for a server elsewhere."""
    name, _, rest = text.partition("=")
    url, _, pid = rest.partition("@")
    return Target(name, url, int(pid) if pid else None)


def print_table(turns: Sequence[Turn], rounds: int) -> None:
    columns = ("qps", "p50_ms", "p95_ms", "p99_ms", "cpu_ms", "recall")
    for load in dict.fromkeys(turn.load for turn in turns):
        of_load = [turn for turn in turns if turn.load == load]
        servers = list(dict.fromkeys(turn.server for turn in of_load))
        busy = statistics.median(turn.load_average for turn in of_load)
        print(f"\n{load}: medians of {rounds} rounds, load average {busy:.0f} on {os.cpu_count()} cores")
        print(f"{'':10}" + "".join(f"{column:>10}" for column in (*columns, "errors")))
        for server in servers:
            own = [turn for turn in of_load if turn.server == server]
            medians = [statistics.median(getattr(turn, column) for turn in own) for column in columns]
            values = "".join(f"{median:10.3f}" if median < 10 else f"{median:10.1f}" for median in medians)
            print(f"{server:10}{values}{sum(turn.num_errors for turn in own):10d}")
        first = [turn for turn in of_load if turn.server == servers[0]]
        for server in servers[1:]:
            other = [turn for turn in of_load if turn.server == server]
            pairs = list(zip(first, other, strict=True))
            ratios = {
                "qps": statistics.median(_ratio(a.qps, b.qps) for a, b in pairs),
                "p99": statistics.median(_ratio(b.p99_ms, a.p99_ms) for a, b in pairs),
                "cpu": statistics.median(_ratio(b.cpu_ms, a.cpu_ms) for a, b in pairs),
            }
            print(
                f"{servers[0]} against {server}: {ratios['qps']:.1f} times the throughput, "
                f"p99 {ratios['p99']:.1f} times and CPU per query {ratios['cpu']:.1f} times lower"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default=",".join(load.name for load in LOADS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="measured in each turn (default: %(default)s)")
    parser.add_argument("--warm-up-s", type=float, default=1.5, help="before that (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "retriever-bench")
    parser.add_argument("--server-args", default=SERVER_ARGS, help="of ours (default: %(default)s)")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL[@PID]", help="a further server")
    parser.add_argument("--json", type=Path, help="write every turn here")
    options = parser.parse_args()
    end_servers_on_sigterm()
    known = {load.name: load for load in LOADS}
    loads = [known[name] for name in options.loads.split(",")]
    questions, turns = Questions(), []
    for encoder in dict.fromkeys(load.encoder for load in loads):
        of_encoder = [load for load in loads if load.encoder == encoder]
        make(encoder, options.data)
        judge = Judge(options.data, encoder)
        with ExitStack() as stack:
            names = {name for load in of_encoder for name in load.servers}
            targets = start_servers(stack, encoder, names, options)
            targets += [other_target(text) for text in options.url]
            for number in range(options.rounds):
                for load in of_encoder:
                    chosen = [t for name in load.servers for t in targets if t.name == name]
                    chosen += [t for t in targets if t.name not in ("ours", "cached", "default", "best")]
                    for target in chosen:
                        turn = run_turn(load, target, questions, judge, options)
                        turns.append(turn)
                        print(f"round {number + 1} {asdict(turn)}", file=sys.stderr, flush=True)
    print_table(turns, options.rounds)
    if options.json:
        options.json.write_text(json.dumps([asdict(turn) for turn in turns], indent=1))


if __name__ == "__main__":
    main()
