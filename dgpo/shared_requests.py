"""Searches that wait at the same time share requests: an answer costs the client and the server less that way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Documents = list[dict[str, Any]]
Request = Callable[[list[str], int, str | None], Awaitable[list[Documents]]]
"""Finds the documents for each of several queries, given topk and the corpus."""


@dataclass(frozen=True)
class _Waiting:
    """A search that waits for its documents."""

    query: str
    found: asyncio.Future[Documents]


class SharedRequests:
    """Sends searches with a bounded number of requests in flight; what waits for one of them goes together.

    A request takes the searches that are there when it is sent, the oldest first, and waits for no others. It is
    answered as a whole.

    Args:
        request: raises what ends all searches of the request.
        max_concurrency: requests in flight.
        max_queries: of one request.
    """

    def __init__(self, request: Request, *, max_concurrency: int, max_queries: int) -> None:
        self._request = request
        self._max_concurrency, self._max_queries = max_concurrency, max_queries
        self._waiting: dict[tuple[int, str | None], list[_Waiting]] = {}  # by topk and corpus
        self._in_flight: set[asyncio.Task[None]] = set()
        self._will_send = False

    async def search(self, query: str, *, topk: int, corpus: str | None) -> Documents:
        """The documents for one query; raises what its request raised."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, loop.create_future())
        self._waiting.setdefault((topk, corpus), []).append(waiting)
        if not self._will_send:
            self._will_send = True
            loop.call_soon(self._send)  # after what else is ready now: a step of the engine ends many turns
        return await waiting.found

    async def close(self) -> None:
        """Gives up all searches."""
        for searches in self._waiting.values():
            for search in searches:
                search.found.cancel()
        self._waiting.clear()
        for request in self._in_flight:
            request.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def _send(self) -> None:
        self._will_send = False
        while self._waiting and len(self._in_flight) < self._max_concurrency:
            key = next(iter(self._waiting))
            searches = [search for search in self._waiting.pop(key) if not search.found.done()]
            if later := searches[self._max_queries :]:
                self._waiting[key] = later  # behind those of other corpora
            if searches:
                request = asyncio.create_task(self._answer(searches[: self._max_queries], *key))
                self._in_flight.add(request)
                request.add_done_callback(self._sent)

    def _sent(self, request: asyncio.Task[None]) -> None:
        self._in_flight.discard(request)
        self._send()

    async def _answer(self, searches: list[_Waiting], topk: int, corpus: str | None) -> None:
        try:
            answers = await self._request([search.query for search in searches], topk, corpus)
        except asyncio.CancelledError:
            for search in searches:
                search.found.cancel()
            raise
        except Exception as error:  # whatever it is, it is the searches' to raise
            for search in searches:
                if not search.found.done():
                    search.found.set_exception(type(error)(*error.args))  # each with a traceback of its own
            return
        for search, documents in zip(searches, answers, strict=True):
            if not search.found.done():  # else its episode has gone
                search.found.set_result(documents)
