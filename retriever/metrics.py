"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from retriever.protocol import LENIENCIES

LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """The counters of one server; `dropped` counts queries that were never encoded because their client had gone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "retriever_requests", "Retrieve requests by corpus and status.", ["corpus", "status"], registry=registry
        )
        self._seconds = Histogram(
            "retriever_request_seconds",
            "From a request's arrival to its answer.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.queries = Counter("retriever_queries", "Queries of answered requests.", registry=registry)
        self.cache_hits = Counter("retriever_cache_hits", "Queries answered from the cache.", registry=registry)
        self.cache_misses = Counter("retriever_cache_misses", "Queries that were searched.", registry=registry)
        self.dropped = Counter(
            "retriever_dropped_queries", "Queries never encoded: their client had gone.", registry=registry
        )
        self.leniencies = Counter(
            "retriever_leniencies", "What was served though a request was not quite right.", ["kind"], registry=registry
        )
        for kind in LENIENCIES:
            self.leniencies.labels(kind)  # from 0 on
        self.unsearchable = Counter(
            "retriever_unsearchable_queries",
            "Queries whose vector is not finite: their requests got 500.",
            registry=registry,
        )
        self._batch_queries = Histogram(
            "retriever_batch_queries", "Queries per batch.", buckets=BATCH_BUCKETS, registry=registry
        )
        self._batch_seconds = Histogram(
            "retriever_batch_seconds", "Encoding and search of a batch.", buckets=LATENCY_BUCKETS_S, registry=registry
        )
        self.waiting = Gauge("retriever_waiting_queries", "Queries that wait for the worker.", registry=registry)
        self.truncated = Gauge(
            "retriever_truncated_texts", "Texts cut to the encoder's limit so far.", registry=registry
        )
        self.cache_bytes = Gauge("retriever_cache_bytes", "Estimated size of the cache.", registry=registry)
        self.ready = Gauge("retriever_ready", "1 once all indexes are loaded.", registry=registry)
        self.passages = Gauge("retriever_passages", "Passages served.", ["corpus"], registry=registry)
        self._bound: dict[tuple[str, int], Counter] = {}

    def observe_request(self, corpus: str, status: int, seconds: float) -> None:
        """Count one answered request; `corpus` must be a name that is served, or the empty string."""
        bound = self._bound.get((corpus, status))
        if bound is None:
            bound = self._bound[corpus, status] = self._requests.labels(corpus, str(status))
        bound.inc()
        self._seconds.observe(seconds)

    def observe_batch(self, num_queries: int, seconds: float) -> None:
        self._batch_queries.observe(num_queries)
        self._batch_seconds.observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)
