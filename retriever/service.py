"""One request from its bytes to its answer: token, limits, cache, batcher. Only the search leaves the event loop."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from retriever.batcher import Batcher, QueueFullError, SearchFunction
from retriever.cache import LRUCache
from retriever.collection import Collection, Hits, LoadProgress, SearchJob
from retriever.limits import ServerLimits
from retriever.metrics import Metrics
from retriever.protocol import RequestError, RetrieveRequest, parse_request, render_answer

logger = logging.getLogger(__name__)

LoadFunction = Callable[[LoadProgress], Collection]

HIT_BYTES = 80  # of one row number and one score in two tuples, on 64-bit CPython
LINGER_S, LINGER_BYTES = 5, 64 << 20
CLIENT_GONE = 499  # never sent; it counts in the metrics, under the status that nginx made known


@dataclass(frozen=True)
class Progress:
    """Where loading stands."""

    corpus: str | None = None
    """The one that is loaded now."""
    num_loaded: int = 0
    num_corpora: int = 0


class RetrievalService:
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
        """`names` are the corpora to come; with a `token`, requests must carry it as `Authorization: Bearer`."""
        self.names, self.default, self.limits = tuple(names), default, limits
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
    def load_error(self) -> Exception | None:
        """Why loading failed, once it has."""
        return self._batcher.load_error

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    @property
    def ready(self) -> bool:
        return self._batcher.loaded.is_set()

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

    def check_token(self, request: Request) -> None:
        """Raise `RequestError` (401) unless the request carries the token; compared in constant time."""
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
        name = self.default if name is None else name
        answer: type[Response] = RefusalOfUnreadBody
        try:
            self.check_token(request)
            if name not in self.names:
                raise RequestError(404, f"no corpus {name!r}; this server has {', '.join(sorted(self.names))}")
            collection = self.loaded_collection()
            body = await self._read_body(request)
            answer = Response
            response = Response(await self._answer(request, collection, name, body), media_type="application/json")
        except RequestError as error:
            response = error_response(error, answer)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        known = name if name in self.names else ""
        self.metrics.observe_request(known, response.status_code, time.perf_counter() - started)
        return response

    async def _answer(self, request: Request, collection: Collection, name: str, body: bytes) -> bytes:
        parsed = parse_request(body, self.limits)
        hits = await self._search(request, name, parsed)
        self.metrics.queries.inc(len(hits))
        return render_answer(collection.corpora[name].corpus, hits, return_scores=parsed.return_scores)

    def loaded_collection(self) -> Collection:
        """The collection; raises `RequestError` (503) while it is loaded."""
        if self._collection is None:
            raise RequestError(503, self._loading_detail(), self._retry_after())
        return self._collection

    async def _search(self, request: Request, name: str, parsed: RetrieveRequest) -> list[Hits]:
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
            found = await self._search_while_connected(request, SearchJob(name, missing, parsed.topk))
            for query, hits in zip(missing, found, strict=True):
                known[query] = hits
                self._cache.put((name, query, parsed.topk), hits, value_bytes=HIT_BYTES * len(hits.rows))
        return [known[query] for query in parsed.queries]

    async def _search_while_connected(self, request: Request, job: SearchJob) -> list[Hits]:
        """The batcher's answer; a client that disconnects takes its job out of the queue."""
        try:
            future = self._batcher.submit(job)
        except QueueFullError:
            detail = f"{self._batcher.num_waiting} queries wait; try again in {self.limits.retry_after_s} s"
            raise RequestError(503, detail, self._retry_after()) from None
        # After the body there is nothing to receive but the end of the connection.
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: future.cancel())
        try:
            return await future
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled():
                self.metrics.dropped.inc(len(job.queries))
                raise ClientDisconnect from None
            raise RequestError(503, "the server is stopping", self._retry_after()) from None  # draining took too long
        except Exception as error:
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
            # Of a body without a stated length nobody knows the end: only closing the connection stops it.
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

    def ready_response(self) -> Response:
        """200 once all corpora are loaded; until then 503 with the progress."""
        progress = self._progress
        content = {"loaded": progress.num_loaded, "corpora": progress.num_corpora}
        if self.ready:
            return json_response(200, {"status": "ready", **content})
        status = "failed" if self.load_error else "loading"
        return json_response(
            503, {"status": status, "detail": self._loading_detail(), **content}, dict(self._retry_after())
        )

    def describe(self) -> dict[str, Any]:
        """What is served, for `/info`."""
        collection = self.loaded_collection()
        corpora: dict[str, dict[str, Any]] = {}
        for name, served in collection.corpora.items():
            encoder = served.manifest.encoder
            corpora[name] = {
                "count": len(served.corpus),
                "method": served.manifest.method,
                "index": served.manifest.index,
                "dimension": served.manifest.dimension,
                "encoder": encoder.to_json() if encoder else None,
                "corpus_sha256": served.manifest.corpus_sha256,
            }
        return {"default": self.default, "corpora": corpora, "limits": asdict(self.limits)}

    def render_metrics(self) -> bytes:
        metrics = self.metrics
        metrics.waiting.set(self._batcher.num_waiting)
        metrics.cache_bytes.set(self._cache.num_bytes)
        if self._collection is not None:
            encoders = self._collection.encoders.values()
            metrics.truncated.set(sum(encoder.num_truncated for encoder in encoders))
        return metrics.render()

    def close(self) -> None:
        """Let the running batch finish, for the time that draining may take."""
        if not self._batcher.close(self.limits.drain_s if self.ready else 0) and self.ready:
            logger.warning("a batch is still running after %d s; it ends with the process", self.limits.drain_s)

    def _loading_detail(self) -> str:
        progress = self._progress
        if self.load_error:
            return f"loading failed: {self.load_error}"
        return f"loading {progress.corpus or 'libraries'}: {progress.num_loaded} of {progress.num_corpora} corpora done"

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.limits.retry_after_s)}


class RefusalOfUnreadBody(Response):
    """Answers at once, then discards the rest of the body for a while.

    Closing a connection whose client still sends resets it, and the client may never see the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while num_bytes < LINGER_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b""})


def json_response(
    status: int,
    content: dict[str, Any],
    headers: dict[str, str] | None = None,
    kind: type[Response] = Response,
) -> Response:
    return kind(orjson.dumps(content), status, headers, media_type="application/json")


def error_response(error: RequestError, kind: type[Response] = Response) -> Response:
    return json_response(error.status, {"detail": str(error)}, dict(error.headers or {}), kind)
