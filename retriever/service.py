"""Searches the corpora of this process: cache, batcher, rendering. Only the search itself leaves the event loop."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request

from retriever.batcher import Batcher, QueueFullError, SearchFunction
from retriever.cache import LRUCache
from retriever.collection import UNSEARCHABLE, Collection, Hits, LoadProgress, SearchJob
from retriever.front import Service
from retriever.limits import ServerLimits
from retriever.protocol import RequestError, RetrieveRequest, parse_request, render_answer

logger = logging.getLogger(__name__)

LoadFunction = Callable[[LoadProgress], Collection]

HIT_BYTES = 80  # of one row number and one score in two tuples, on 64-bit CPython


@dataclass(frozen=True)
class Progress:
    """Where loading stands."""

    corpus: str | None = None
    """The one that is loaded now."""
    num_loaded: int = 0
    num_corpora: int = 0


class RetrievalService(Service):
    """Serves the collection that `load` returns; `load` runs in the background, and until it ends requests get 503."""

    def __init__(
        self,
        load: LoadFunction,
        *,
        names: Sequence[str],
        default: str,
        limits: ServerLimits,
        token: str | None = None,
    ) -> None:
        """`names` are the corpora to come."""
        super().__init__(limits=limits, token=token)
        self.names, self.default = tuple(names), default
        self._load_collection = load
        self._collection: Collection | None = None
        self._progress = Progress(num_corpora=len(names))
        self._cache: LRUCache[Hits] = LRUCache(limits.cache_mb << 20)
        self._batcher = Batcher(
            self._load,
            max_batch=limits.max_batch,
            max_waiting=limits.max_waiting_queries,
            on_batch=self.metrics.observe_batch,
        )

    @property
    def load_error(self) -> Exception | None:
        return self._batcher.load_error

    def _load(self) -> SearchFunction:
        """Runs on the batcher's thread, which owns the device."""

        def report(corpus: str, num_loaded: int, num_corpora: int) -> None:
            self._progress = Progress(corpus, num_loaded, num_corpora)

        collection = self._load_collection(report)
        self._progress = Progress(None, len(collection.corpora), len(collection.corpora))
        for name, served in collection.corpora.items():
            self.metrics.passages.labels(name).set(len(served.corpus))
        self.metrics.ready.set(1)
        self._collection = collection
        return collection.search

    async def start(self) -> None:
        self._batcher.start()

    def progress(self) -> tuple[int, int]:
        return self._progress.num_loaded, self._progress.num_corpora

    def check_ready(self) -> None:
        self._loaded()

    async def search(self, request: Request, name: str, body: bytes) -> bytes:
        parsed = parse_request(body, self.limits)
        hits = await self._find(request, name, parsed)
        self.metrics.queries.inc(len(hits))
        return render_answer(self._loaded().corpora[name].corpus, hits, return_scores=parsed.return_scores)

    def _loaded(self) -> Collection:
        """The collection; raises `RequestError` (503) while there is none."""
        if self._collection is not None:
            return self._collection
        now = self._progress
        detail = f"loading {now.corpus or 'libraries'}: {now.num_loaded} of {now.num_corpora} corpora done"
        if self.load_error:
            detail = f"loading failed: {self.load_error}"
        raise RequestError(503, detail, self.retry_after())

    async def _find(self, request: Request, name: str, parsed: RetrieveRequest) -> list[Hits]:
        """Hits per query; only what the cache lacks is searched, and a repeated query once."""
        known: dict[str, Hits] = {}
        missing: list[str] = []
        for query in dict.fromkeys(parsed.queries):
            cached = self._cache.get((name, query, parsed.topk))
            if cached is None:
                missing.append(query)
            else:
                known[query] = cached
        self.metrics.cache_hits.inc(len(known))
        self.metrics.cache_misses.inc(len(missing))
        if missing:
            future = self._submit(SearchJob(name, missing, parsed.topk))
            found = await self.while_connected(request, future, len(missing))
            for query, hits in zip(missing, found, strict=True):
                known[query] = hits
                if hits is UNSEARCHABLE:
                    self.metrics.unsearchable.inc()
                    continue
                self._cache.put((name, query, parsed.topk), hits, value_bytes=HIT_BYTES * len(hits.rows))
        if known and all(hits is UNSEARCHABLE for hits in known.values()):
            raise RequestError(500, "the encoder gives no query of this request a finite vector (NaN or infinite)")
        return [known[query] for query in parsed.queries]

    def _submit(self, job: SearchJob) -> "asyncio.Future[list[Hits]]":
        try:
            return self._batcher.submit(job)
        except QueueFullError:
            detail = f"{self._batcher.num_waiting} queries wait; try again in {self.limits.retry_after_s} s"
            raise RequestError(503, detail, self.retry_after()) from None

    def describe(self) -> dict[str, Any]:
        corpora: dict[str, dict[str, Any]] = {}
        for name, served in self._loaded().corpora.items():
            manifest = served.manifest
            corpora[name] = {
                "count": len(served.corpus),
                "index_type": manifest.index_type,
                "dimension": manifest.dimension,
                "encoder": manifest.encoder.to_json() if manifest.encoder else None,
                "corpus_sha256": manifest.corpus_sha256,
            }
        return {"default": self.default, "corpora": corpora, "limits": asdict(self.limits)}

    def refresh_metrics(self) -> None:
        self.metrics.waiting.set(self._batcher.num_waiting)
        self.metrics.cache_bytes.set(self._cache.num_bytes)
        if self._collection is not None:
            encoders = self._collection.encoders.values()
            self.metrics.truncated.set(sum(encoder.num_truncated for encoder in encoders))

    async def close(self) -> None:
        """Let the running batch finish, for the time that draining may take."""
        timeout_s = self.limits.drain_s if self.ready else 0
        if not await asyncio.to_thread(self._batcher.close, timeout_s) and self.ready:
            logger.warning("a batch is still running after %d s; it ends with the process", timeout_s)
