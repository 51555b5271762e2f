"""What one request and one server may take. The one home of these defaults; `retriever.serve` has a flag for each."""

from dataclasses import dataclass, field, fields


def _limit(default: int, meaning: str) -> int:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    default_topk: int = _limit(3, "passages per query when a request has no topk")
    max_topk: int = _limit(100, "passages per query")
    max_queries: int = _limit(4096, "queries in one request; Search-R1's client sends a whole rollout batch in one")
    max_query_chars: int = _limit(8192, "characters of one query")
    max_body_bytes: int = _limit(16 << 20, "bytes of one request; past it reading stops")
    body_timeout_s: int = _limit(30, "seconds that a request may take to arrive")
    max_waiting_queries: int = _limit(16384, "queries that wait, over all requests; past it a request gets 503")
    retry_after_s: int = _limit(1, "seconds after which a refused request should come back")
    max_batch: int = _limit(256, "queries that are encoded and searched at once")
    cache_mb: int = _limit(128, "memory for answers by (corpus, query, topk); 0 turns the cache off")
    drain_s: int = _limit(10, "seconds that running requests may take to finish after SIGTERM")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), 0 if limit.name == "cache_mb" else 1
            if value < least:
                raise ValueError(f"{limit.name} is {value}; expected at least {least}")
        if self.default_topk > self.max_topk:
            raise ValueError(f"default_topk is {self.default_topk}, more than max_topk={self.max_topk}: change one")
