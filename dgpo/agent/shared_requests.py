"""Searches that wait at the same time share requests: an answer costs the client and the server less that way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

Documents = list[dict[str, Any]]
# Finds documents for each of several queries, or what its search is to raise; given topk, the corpus, and when the
# oldest of these searches began, on the loop's clock
Request = Callable[[list[str], int, str | None, float], Awaitable[Sequence[Documents | Exception]]]


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A search that waits for its documents."""

    query: str
    found: asyncio.Future[Documents]
    began: float


class SharedRequests:
    """Sends searches with a bounded number of requests in flight; what waits for one of them goes together.

    A request takes the searches that are there when it is sent, the oldest first, and waits for no others. It is
    answered as a whole, and given up when all its searches are.

    Args:
        request: what it raises ends all searches of the request.
        max_concurrency: requests in flight, at least 1.
        max_queries: of one request, at least 1.
    """

    def __init__(self, request: Request, *, max_concurrency: int, max_queries: int) -> None:
        if max_concurrency < 1 or max_queries < 1:
            raise ValueError(f"max_concurrency={max_concurrency}, max_queries={max_queries}: expected at least 1 each")
        self._request = request
        self._max_concurrency, self._max_queries = max_concurrency, max_queries
        self._waiting: dict[tuple[int, str | None], list[_Waiting]] = {}  # by topk and corpus
        self._in_flight: dict[asyncio.Task[None], list[_Waiting]] = {}
        self._will_send = False

    async def search(self, query: str, *, topk: int, corpus: str | None) -> Documents:
        """The documents for one query; raises what its request raised or found for it."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, loop.create_future(), loop.time())
        self._waiting.setdefault((topk, corpus), []).append(waiting)
        if not self._will_send:
            self._will_send = True
            loop.call_soon(self._send)  # after what else is ready now: a step of the engine ends many turns
        try:
            return await waiting.found
        except asyncio.CancelledError:
            for request, searches in self._in_flight.items():
                if all(search.found.done() for search in searches):
                    request.cancel()
            raise

    async def close(self) -> None:
        """Cancels all searches."""
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
            if now := searches[: self._max_queries]:
                request = asyncio.create_task(self._answer(now, *key))
                self._in_flight[request] = now
                request.add_done_callback(self._sent)

    def _sent(self, request: asyncio.Task[None]) -> None:
        del self._in_flight[request]
        self._send()

    async def _answer(self, searches: list[_Waiting], topk: int, corpus: str | None) -> None:
        try:
            queries = [search.query for search in searches]
            outcomes = await self._request(queries, topk, corpus, searches[0].began)
            if len(outcomes) != len(searches):
                raise ValueError(f"{len(outcomes)} answers to {len(searches)} queries: expected one each")
        except asyncio.CancelledError:
            for search in searches:
                search.found.cancel()
            raise
        except Exception as error:  # whatever it is, it is the searches' to raise
            outcomes = [error] * len(searches)
        for search, outcome in zip(searches, outcomes, strict=True):
            if search.found.done():  # its episode has gone
                continue
            if isinstance(outcome, Exception):
                search.found.set_exception(outcome)
            else:
                search.found.set_result(outcome)
