"""What one request and one server may take. The one home of these defaults; `retriever.serve` has a flag for each."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    default_topk: int = 3
    """Passages per query when a request has no `topk`."""
    max_topk: int = 100
    max_queries: int = 4096
    """Queries in one request; Search-R1's client sends a whole rollout batch in one."""
    max_query_chars: int = 8192
    max_body_bytes: int = 16 << 20
    max_waiting_queries: int = 16384
    """Queries that may wait for the worker, over all requests; beyond it a request gets 503 and Retry-After."""
    max_batch: int = 256
    """Queries that the worker takes at once."""
    cache_size: int = 100_000
    """Answers kept, by (corpus, query, topk); 0 turns the cache off."""
    retry_after_s: int = 1
    drain_s: int = 10
    """How long running requests may take to finish after SIGTERM."""
