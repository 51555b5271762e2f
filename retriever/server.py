"""The HTTP application: `/retrieve`, `/corpora/{name}/retrieve` and `/health`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from retriever.batcher import Batcher, QueueFullError
from retriever.cache import LRUCache
from retriever.collection import Collection, Hits, SearchJob
from retriever.limits import ServerLimits
from retriever.protocol import RequestError, RetrieveRequest, parse_request, render_answer

REQUEST_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "queries": {"type": "array", "items": {"type": "string", "minLength": 1}},
                        "query": {"type": "string", "minLength": 1, "description": "instead of queries"},
                        "topk": {"type": ["integer", "null"], "minimum": 1},
                        "return_scores": {"type": "boolean", "default": False},
                    },
                },
                "example": {"queries": ["capital of France"], "topk": 3, "return_scores": True},
            }
        },
    },
    "responses": {
        "200": {"description": 'one list per query: {"document", "score"} pairs, or documents without scores'},
        "400": {"description": "not JSON"},
        "404": {"description": "no such corpus"},
        "413": {"description": "body too large"},
        "422": {"description": "a wrong value, or one beyond the server's limits"},
        "503": {"description": "too many queries wait; Retry-After says when to come back"},
    },
}


def create_app(collection: Collection, *, default: str, limits: ServerLimits) -> FastAPI:
    """An ASGI application that serves `collection`; `/retrieve` asks the corpus `default`.

    Bodies are read by orjson and our own checks rather than by pydantic models, which cost half the throughput
    and answer a wrong value with a page of JSON.
    """
    service = RetrievalService(collection, default=default, limits=limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="dgpo retriever", lifespan=lifespan)
    app.state.service = service

    @app.post("/retrieve", openapi_extra=REQUEST_SCHEMA)
    async def retrieve(request: Request) -> Response:
        """Search the default corpus."""
        return await service.answer(request)

    @app.post("/corpora/{name}/retrieve", openapi_extra=REQUEST_SCHEMA)
    async def retrieve_from(name: str, request: Request) -> Response:
        """Search one corpus by its name."""
        return await service.answer(request, name)

    @app.get("/health")
    async def health() -> Response:
        """What is served, and the counters so far."""
        return json_response(200, {"status": "ok", **service.describe()})

    return app


class RetrievalService:
    """Requests in, responses out: checks, cache, batcher, rendering. Everything but the search runs on the loop."""

    def __init__(self, collection: Collection, *, default: str, limits: ServerLimits) -> None:
        self._collection, self._default, self._limits = collection, default, limits
        self._cache: LRUCache[Hits] = LRUCache(limits.cache_size)
        self._batcher = Batcher(collection.search, max_batch=limits.max_batch, max_waiting=limits.max_waiting_queries)
        self.num_requests = self.num_queries = self.num_refused = 0

    async def answer(self, request: Request, name: str | None = None) -> Response:
        """The response to one retrieve request on corpus `name` (None = the default one)."""
        name = self._default if name is None else name
        self.num_requests += 1
        try:
            served = self._collection.corpora.get(name)
            if served is None:
                known = ", ".join(sorted(self._collection.corpora))
                raise RequestError(404, f"no corpus {name!r}; this server has {known}")
            parsed = parse_request(await self._read_body(request), self._limits)
            hits = await self._search(name, parsed)
        except RequestError as error:
            return json_response(error.status, {"detail": str(error)})
        except QueueFullError:
            self.num_refused += 1
            detail = f"{self._batcher.num_waiting} queries wait; try again in {self._limits.retry_after_s} s"
            return json_response(503, {"detail": detail}, {"Retry-After": str(self._limits.retry_after_s)})
        body = render_answer(served.corpus, hits, return_scores=parsed.return_scores)
        return Response(body, media_type="application/json")

    async def _search(self, name: str, request: RetrieveRequest) -> list[Hits]:
        """Hits per query; only what the cache lacks is searched, and a repeated query once."""
        self.num_queries += len(request.queries)
        known: dict[str, Hits] = {}
        missing: list[str] = []
        for query in dict.fromkeys(request.queries):
            cached = self._cache.get((name, query, request.topk))
            if cached is None:
                missing.append(query)
            else:
                known[query] = cached
        if missing:
            found = await self._batcher.submit(SearchJob(name, missing, request.topk))
            for query, hits in zip(missing, found, strict=True):
                known[query] = hits
                self._cache.put((name, query, request.topk), hits)
        return [known[query] for query in request.queries]

    async def _read_body(self, request: Request) -> bytes:
        """The body, read no further than the limit."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.max_body_bytes:
                raise RequestError(413, f"the body is larger than {self._limits.max_body_bytes} bytes; send less")
        return bytes(body)

    def describe(self) -> dict[str, Any]:
        """Corpora and counters, for `/health`."""
        corpora: dict[str, dict[str, Any]] = {}
        for name, served in self._collection.corpora.items():
            encoder = served.manifest.encoder
            corpora[name] = {
                "count": len(served.corpus),
                "method": served.manifest.method,
                "encoder": encoder.spec if encoder else None,
                "corpus_sha256": served.manifest.corpus_sha256,
            }
        return {
            "default": self._default,
            "method": corpora[self._default]["method"],
            "encoder": corpora[self._default]["encoder"],
            "corpora": corpora,
            "num_requests": self.num_requests,
            "num_queries": self.num_queries,
            "num_refused": self.num_refused,
            "num_batches": self._batcher.num_batches,
            "num_waiting": self._batcher.num_waiting,
            "num_truncated": sum(encoder.num_truncated for encoder in self._collection.encoders.values()),
            "cache": {
                "size": len(self._cache),
                "num_hits": self._cache.num_hits,
                "num_misses": self._cache.num_misses,
            },
        }

    def close(self) -> None:
        self._batcher.close()


def json_response(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")
