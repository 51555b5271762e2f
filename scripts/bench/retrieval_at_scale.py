"""Memory, start-up time and queries per second of 21 million passages, from constants that are measured or stated.

python scripts/bench/retrieval_at_scale.py        # under a minute; prints the tables of docs/retrieval-at-scale.md

The time of one batch is arithmetic; throughput is simulated: clients that wait for their answers, an event loop that
takes and renders requests one by one, and a worker that takes what waits. The constants and their sources are below.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_PASSAGES, DIMENSION = 21_015_324, 768  # wiki-18, E5-base
CORPUS_GB = 14.3  # wiki-18.jsonl
MAX_BATCH = 256  # retriever/options.py
SIMULATED_MS = 10_000.0

# Measured in CPU time on one core of an AVX512 EPYC (2 contended cores), by the scripts in brackets.
LOOP_MS_PER_REQUEST = 0.35  # what one query a request costs beyond 512 queries a request (retrieval.py)
RENDER_MS_PER_QUERY = 0.05  # cache, rows, json of a query (retrieval.py)
RESCORE_MS_PER_QUERY = 0.012  # 16 mapped rows of 768 float32 (index_types.py, the part beyond the product)
START_CPU_S = 6.2  # libraries, encoder, checks of a million passages (index_start.py)
PRIVATE_GB, PRIVATE_GB_PER_MILLION = 0.42, 0.009  # without and per million passages (index_start.py)
FLAT_GFLOPS, BF16_GFLOPS = 85.0, 140.0  # one core, batches of 64 and more (index_types.py)
HNSW_SQ8_MS = 0.4  # efSearch 128 at 30,000 rows (index_types.py)
MINILM_MS_PER_QUERY = 1.8  # bfloat16, batches of 64 (index_types.py)

# Stated: not measured here. The first three are what an H200 is known to do; the rest are assumptions.
GPU_BYTES_PER_S = 4.3e12
GPU_FLOPS = 600e12  # 16 bits, sustained
GPU_ENCODE_MS = ((1, 64, 512), (6.0, 8.0, 10.0))  # E5-base, queries of about 20 tokens, by batch size
DISK_BYTES_PER_S = 3e9  # one NVMe drive
HOST_TO_GPU_BYTES_PER_S = 8e9  # from pageable memory
NODE_CORES, NODE_EFFICIENCY = 64, 0.6
NODE_BYTES_PER_S = 300e9
AMX_SPEED_UP = 4.0  # 16-bit products, against AVX512_BF16
E5_OVER_MINILM = 8.0  # 86 M parameters in the layers against 10.6 M
HNSW_GROWTH = 3.0  # 21 M rows against 30,000: a longer walk, and rows outside the caches


@dataclass(frozen=True)
class Setting:
    """A way to serve the corpus on one machine; times are of one worker."""

    name: str
    index_gb: float  # on disk, and read or mapped at start
    gpu_gb: float
    encode_ms: Callable[[int], float]
    search_ms: Callable[[int], float]
    num_copies: int = 1  # workers of one deployment, each with a server of its own, that share the clients

    def batch_ms(self, size: int) -> float:
        rescore = 0.0 if "HNSW" in self.name else size * RESCORE_MS_PER_QUERY
        return self.encode_ms(size) + self.search_ms(size) + rescore + size * RENDER_MS_PER_QUERY


def gpu_encode_ms(size: int) -> float:
    return float(np.interp(size, *GPU_ENCODE_MS))


def gpu_search_ms(size: int) -> float:
    """One pass over the 16-bit rows, or the arithmetic, whichever takes longer, and a pass over the scores."""
    read_s = NUM_PASSAGES * DIMENSION * 2 / GPU_BYTES_PER_S
    multiply_s = 2 * NUM_PASSAGES * DIMENSION * size / GPU_FLOPS
    scores_s = 2 * NUM_PASSAGES * size * 4 / GPU_BYTES_PER_S  # float32 scores are written once and read once
    return (max(read_s, multiply_s) + scores_s) * 1e3


def node_encode_ms(size: int) -> float:
    """E5-base on all cores: a batch of one uses them badly, like a batch of eight on eight cores."""
    each_ms = MINILM_MS_PER_QUERY * E5_OVER_MINILM
    return each_ms * max(size, 8) / (NODE_CORES * NODE_EFFICIENCY)


def node_product_ms(size: int, *, gflops: float, bytes_per_value: int) -> float:
    read_s = NUM_PASSAGES * DIMENSION * bytes_per_value / NODE_BYTES_PER_S
    multiply_s = 2 * NUM_PASSAGES * DIMENSION * size / (gflops * 1e9 * NODE_CORES * NODE_EFFICIENCY)
    return max(read_s, multiply_s) * 1e3


def node_graph_ms(size: int) -> float:
    """Queries of a batch walk in parallel, one on each core."""
    return HNSW_SQ8_MS * HNSW_GROWTH * max(1.0, size / (NODE_CORES * NODE_EFFICIENCY))


def settings() -> list[Setting]:
    fp32, fp16 = NUM_PASSAGES * DIMENSION * 4e-9, NUM_PASSAGES * DIMENSION * 2e-9
    graph = NUM_PASSAGES * (DIMENSION + 2 * 32 * 4 * 1.03 + 8) * 1e-9  # codes, links of 32 neighbours, levels
    return [
        Setting("1 H200, Flat, torch fp16 + fp32 rescore", fp32, fp16, gpu_encode_ms, gpu_search_ms),
        Setting("1 H200, SQfp16, torch", fp16, fp16, gpu_encode_ms, gpu_search_ms),
        Setting("8 H200, a copy each", fp16, fp16, gpu_encode_ms, gpu_search_ms, num_copies=8),
        Setting(
            "CPU node, Flat, FAISS",
            fp32,
            0,
            node_encode_ms,
            lambda size: node_product_ms(size, gflops=FLAT_GFLOPS, bytes_per_value=4),
        ),
        Setting(
            "CPU node, Flat, torch bf16 (AMX)",
            fp32,
            0,
            node_encode_ms,
            lambda size: node_product_ms(size, gflops=BF16_GFLOPS * AMX_SPEED_UP, bytes_per_value=2),
        ),
        Setting("CPU node, HNSW32_SQ8", graph, 0, node_encode_ms, node_graph_ms),
    ]


def simulate(
    num_clients: int, batch_ms: Callable[[int], float], *, max_batch: int = MAX_BATCH, num_queries: int | None = None
) -> tuple[float, list[float]]:
    """Milliseconds simulated, and the latencies of all answers, of clients that ask again at once.

    With `num_queries`, clients stop after so many in all, and the time is that of the last answer.
    """
    events: list[tuple[float, int, str, int]] = [(0.0, client, "arrive", client) for client in range(num_clients)]
    asked_ms, latencies = [0.0] * num_clients, []
    num_events, num_asked, now_ms, loop_free_ms, worker_free = num_clients, num_clients, 0.0, 0.0, True
    waiting: deque[int] = deque()
    running: list[int] = []

    def push(at_ms: float, kind: str, client: int) -> None:
        nonlocal num_events
        heapq.heappush(events, (at_ms, num_events, kind, client))
        num_events += 1

    while events and (num_queries or now_ms < SIMULATED_MS):
        now_ms, _, kind, client = heapq.heappop(events)
        if kind == "arrive":  # half of the loop's time goes into taking a request, half into its answer
            loop_free_ms = max(loop_free_ms, now_ms) + LOOP_MS_PER_REQUEST / 2
            push(loop_free_ms, "wait", client)
        elif kind == "wait":
            waiting.append(client)
        elif kind == "done":
            worker_free = True
            for finished in running:
                loop_free_ms = max(loop_free_ms, now_ms) + LOOP_MS_PER_REQUEST / 2
                push(loop_free_ms, "answer", finished)
        else:
            latencies.append(now_ms - asked_ms[client])
            if num_queries is None or num_asked < num_queries:
                num_asked += 1
                asked_ms[client] = now_ms
                push(now_ms, "arrive", client)
        if worker_free and waiting:
            running = [waiting.popleft() for _ in range(min(max_batch, len(waiting)))]
            worker_free = False
            push(now_ms + batch_ms(len(running)), "done", -1)
    return now_ms, latencies


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row)} |")


def number(value: float) -> str:
    """Two digits that mean something."""
    return f"{float(f'{value:.2g}'):,.10g}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    known = settings()
    memory = []
    for setting in known:
        # A GPU's copy is made by reading the file once; a mapped index is read as it is searched
        read_s = setting.index_gb * 1e9 / DISK_BYTES_PER_S
        copy_s = setting.index_gb * 1e9 / HOST_TO_GPU_BYTES_PER_S if setting.gpu_gb else 0.0
        private_gb = PRIVATE_GB + NUM_PASSAGES / 1e6 * PRIVATE_GB_PER_MILLION
        if "bf16" in setting.name:
            private_gb += setting.index_gb / 2
        loads = setting.gpu_gb or "bf16" in setting.name
        cold_s, warm_s = (START_CPU_S + max(read_s, copy_s), START_CPU_S + copy_s) if loads else (START_CPU_S,) * 2
        cells = [
            setting.index_gb,
            setting.gpu_gb,
            private_gb,
            setting.index_gb + CORPUS_GB,
            cold_s,
            warm_s,
        ]
        memory.append([setting.name, *(number(cell) if cell else "-" for cell in cells)])
    columns = ["setting", "index GB", "GPU GB", "private GB", "page cache GB wanted", "start s, cold", "start s, warm"]
    show("Memory of one server, and its start", columns, memory)

    sizes = (1, 64, 256)
    rows = []
    for setting in known:
        parts = [f"{number(setting.encode_ms(size))} + {number(setting.search_ms(size))}" for size in sizes]
        rows.append([setting.name, *parts])
    show("One batch: encode + search, ms", ["setting", *(f"{size} queries" for size in sizes)], rows)

    rows = []
    for setting in known:
        throughputs = []
        for num_clients in (64, 512, 4096):
            per_copy = max(1, num_clients // setting.num_copies)
            took_ms, latencies = simulate(per_copy, setting.batch_ms)
            qps = len(latencies) / took_ms * 1e3 * setting.num_copies
            settled = latencies[len(latencies) // 5 :] or [float("nan")]
            throughputs.append(f"{number(qps)} ({number(float(np.percentile(settled, 99)))})")
        rows.append([setting.name, *throughputs])
    clients = [f"{num} clients" for num in (64, 512, 4096)]
    show("One query a request, simulated: queries per second (p99 in ms)", ["setting", *clients], rows)

    rows = []
    for setting in known:
        per_copy = 512 // setting.num_copies
        singly_ms, _ = simulate(per_copy, setting.batch_ms, num_queries=4 * per_copy)
        together_ms = 4 * sum(
            setting.batch_ms(min(MAX_BATCH, per_copy - done)) for done in range(0, per_copy, MAX_BATCH)
        )
        unbatched_ms = 4 * per_copy * setting.batch_ms(1)
        rows.append([setting.name, *(number(ms / 1e3) for ms in (singly_ms, together_ms, unbatched_ms))])
    columns = ["setting", "512 clients x 4", "4 requests of 512", "without batching"]
    show("The searches of one training step (512 episodes, 4 searches each), seconds", columns, rows)


if __name__ == "__main__":
    main()
