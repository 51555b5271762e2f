"""What stands between HTTP and the loaded corpora."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from retriever.batcher import Batcher, SearchFunction
from retriever.cache import LRUCache
from retriever.collection import UNSEARCHABLE, Collection, Hits, LoadProgress, SearchJob
from retriever.errors import RetrieverError
from retriever.metrics import Metrics
from retriever.options import ServerLimits
from retriever.protocol import RequestError, RetrieveRequest, parse_request, render_answer
from retriever.responses import RefusalOfUnreadBody, error_response, json_response

logger = logging.getLogger(__name__)

LoadFunction = Callable[[LoadProgress], Collection]
Result = TypeVar("Result")

HIT_BYTES = 80  # a row number and a score in two tuples, on 64-bit CPython
NOTHING = Hits((), ())  # found for an empty query, or with topk 0
CLIENT_GONE = 499  # never sent; it counts in the metrics, under the status that nginx made known


@dataclass(frozen=True)
class Progress:
    """Where loading stands."""

    corpus: str | None = None  # the one that is loaded now
    num_loaded: int = 0
    num_corpora: int = 0


class Service:
    """Requests in, responses out: token, limits, refusals, cache, batcher, disconnects, counts.

    Serves the collection that `load` returns; `load` runs in the background, and until it ends requests get 503. Only
    the search itself leaves the event loop.
    """

    def __init__(
        self,
        load: LoadFunction,
        *,
        names: Sequence[str],
        default: str,
        limits: ServerLimits,
        token: str | None = None,
    ) -> None:
        """`names` are the corpora to come; with a `token`, requests must carry it as `Authorization: Bearer`."""
        self.names, self.default = tuple(names), default
        self.limits = limits
        self.metrics = Metrics()
        self._token = token
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
    def ready(self) -> bool:
        try:
            self._loaded()
        except RequestError:
            return False
        return True

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    @property
    def load_error(self) -> Exception | None:
        """Why this server will never be ready, once that is known."""
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
        """Called once, on the event loop, before the first request."""
        self._batcher.start()

    def check_token(self, request: Request) -> None:
        """Raises `RequestError` (401) unless the request carries the token; compared in constant time."""
        if self._token is None:
            return
        scheme, _, credential = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(credential.strip().encode(), self._token.encode()):
            raise RequestError(
                401, "this server needs its token: send Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"}
            )

    async def answer(self, request: Request, name: str | None = None) -> Response:
        """The response to one retrieve request on corpus `name` (None = the default one)."""
        started = time.perf_counter()
        kind: type[Response] = RefusalOfUnreadBody
        try:
            self.check_token(request)
            self._loaded()
            name = self.default if name is None else name
            if name not in self.names:
                raise RequestError(404, f"no corpus {name!r}; this server has {', '.join(sorted(self.names))}")
            body = await self._read_body(request)
            kind = Response
            response = Response(await self._search(request, name, body), media_type="application/json")
        except RequestError as error:
            response = error_response(error, kind)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        known = name if name is not None and name in self.names else ""
        self.metrics.observe_request(known, response.status_code, time.perf_counter() - started)
        return response

    def ready_response(self) -> Response:
        """200 once searches can be answered; until then 503 with the progress."""
        content: dict[str, Any] = {"loaded": self._progress.num_loaded, "parts": self._progress.num_corpora}
        try:
            for served in self._loaded().corpora.values():
                served.check_unchanged()
        except RetrieverError as error:
            return json_response(503, {"status": "rewritten", "detail": str(error), **content})
        except RequestError as error:
            return json_response(503, {"status": "loading", "detail": str(error), **content}, dict(error.headers or {}))
        return json_response(200, {"status": "ready", **content})

    def describe(self) -> dict[str, Any]:
        """The content of `/info`; raises `RequestError` (503) while it is not known."""
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

    def render_metrics(self) -> bytes:
        """The content of `/metrics`."""
        self.metrics.waiting.set(self._batcher.num_waiting)
        self.metrics.cache_bytes.set(self._cache.num_bytes)
        if self._collection is not None:
            encoders = self._collection.encoders.values()
            self.metrics.truncated.set(sum(encoder.num_truncated for encoder in encoders))
        return self.metrics.render()

    async def close(self) -> None:
        """Lets the running batch finish, for the time that draining may take."""
        timeout_s = self.limits.drain_s if self.ready else 0
        if not await asyncio.to_thread(self._batcher.close, timeout_s) and self.ready:
            logger.warning("a batch is still running after %d s; it ends with the process", timeout_s)

    async def _search(self, request: Request, name: str, body: bytes) -> bytes:
        """The answer's bytes; raises `RequestError`, or `ClientDisconnect` when the client has gone."""
        parsed = parse_request(body, self.limits)
        for kind, number in parsed.leniencies.items():
            self.metrics.leniencies.labels(kind).inc(number)
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
        raise RequestError(503, detail, self._retry_after())

    async def _find(self, request: Request, name: str, parsed: RetrieveRequest) -> list[Hits]:
        """Hits per query; only what the cache lacks is searched, and a repeated query once."""
        known: dict[str, Hits] = {}
        missing: list[str] = []
        for query in dict.fromkeys(query for query in parsed.queries if query and parsed.topk):
            cached = self._cache.get((name, query, parsed.topk))
            if cached is None:
                missing.append(query)
            else:
                known[query] = cached
        self.metrics.cache_hits.inc(len(known))
        self.metrics.cache_misses.inc(len(missing))
        if missing:
            future = self._submit(SearchJob(name, missing, parsed.topk))
            found = await self._while_connected(request, future, len(missing))
            for query, hits in zip(missing, found, strict=True):
                known[query] = hits
                if hits is UNSEARCHABLE:
                    self.metrics.unsearchable.inc()
                    continue
                self._cache.put((name, query, parsed.topk), hits, value_bytes=HIT_BYTES * len(hits.rows))
        failed = [number for number, query in enumerate(parsed.queries) if known.get(query) is UNSEARCHABLE]
        if failed:  # an empty list would say that there is nothing to find
            also = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise RequestError(
                500,
                f"the encoder gives queries[{failed[0]}]{also} no finite vector (NaN or infinite): send the others "
                "without it",
            )
        return [known.get(query, NOTHING) for query in parsed.queries]

    def _submit(self, job: SearchJob) -> asyncio.Future[list[Hits]]:
        try:
            return self._batcher.submit(job)
        except asyncio.QueueFull:
            detail = f"{self._batcher.num_waiting} queries wait; try again in {self.limits.retry_after_s} s"
            raise RequestError(503, detail, self._retry_after()) from None

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.limits.retry_after_s)}

    async def _while_connected(self, request: Request, work: asyncio.Future[Result], num_queries: int) -> Result:
        """The outcome of `work`, which is cancelled when the client disconnects or draining takes too long."""
        # After the body there is nothing to receive but the end of the connection.
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: work.cancel())
        try:
            return await work
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled():
                self.metrics.dropped.inc(num_queries)
                raise ClientDisconnect from None
            raise RequestError(503, "the server is stopping", self._retry_after()) from None
        except RequestError:
            raise
        except RetrieverError as error:  # files changed: every search to come fails alike
            logger.error("%s", error)
            raise RequestError(503, str(error), self._retry_after()) from None
        except Exception as error:
            logger.exception("a search failed")
            raise RequestError(500, f"the search failed ({type(error).__name__}); the server's log says why") from None
        finally:
            gone.cancel()

    async def _read_body(self, request: Request) -> bytes:
        """The body, read no further and no longer than the limits; raises `RequestError` (413, 408)."""
        max_bytes, timeout_s = self.limits.max_body_bytes, self.limits.body_timeout_s
        stated = request.headers.get("content-length", "")
        too_large = RequestError(
            413,
            f"the body is larger than {max_bytes} bytes; send less",
            # Nobody knows the end of a body without a stated length: only closing the connection stops it.
            None if stated else {"Connection": "close"},
        )
        if stated.isdigit() and int(stated) > max_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise too_large
        except TimeoutError:
            detail = f"the body did not arrive in {timeout_s} s; send it faster, or in several requests"
            raise RequestError(408, detail, {"Connection": "close"}) from None
        return bytes(body)
