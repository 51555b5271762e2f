"""Batching across requests: one thread owns the indexes and takes whatever waits as soon as it is free.

There is no fixed wait: an idle server answers at once, and batches grow by themselves under load.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from retriever.collection import Hits, SearchJob

logger = logging.getLogger(__name__)

SearchFunction = Callable[[Sequence[SearchJob]], list[list[Hits]]]


class QueueFullError(Exception):
    """So many queries wait that another request would only make all of them slower."""


@dataclass(frozen=True)
class _Pending:
    job: SearchJob
    future: "asyncio.Future[list[Hits]]"
    loop: asyncio.AbstractEventLoop


class Batcher:
    """Runs `search` on one thread of its own, on the jobs that asynchronous callers submit."""

    def __init__(self, search: SearchFunction, *, max_batch: int, max_waiting: int) -> None:
        """`max_batch` and `max_waiting` count queries; a job with more than `max_batch` runs on its own."""
        self._search, self._max_batch, self._max_waiting = search, max_batch, max_waiting
        self._pending: deque[_Pending] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.num_waiting = 0
        self.num_batches = 0
        self._thread = threading.Thread(target=self._work, name="retriever-batcher", daemon=True)
        self._thread.start()

    async def submit(self, job: SearchJob) -> list[Hits]:
        """The hits of a job; raises `QueueFullError` at once when too many queries wait already.

        A caller that is cancelled while its job waits frees the slot.
        """
        loop = asyncio.get_running_loop()
        pending = _Pending(job, loop.create_future(), loop)
        with self._changed:
            if self._closed or self.num_waiting + len(job.queries) > self._max_waiting:
                raise QueueFullError
            self._pending.append(pending)
            self.num_waiting += len(job.queries)
            self._changed.notify()
        try:
            return await pending.future
        except asyncio.CancelledError:
            with self._changed, suppress(ValueError):  # ValueError: the worker has it already
                self._pending.remove(pending)
                self.num_waiting -= len(job.queries)
            raise

    def close(self) -> None:
        """Finish the jobs that wait, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _take(self) -> list[_Pending]:
        """Block until jobs wait, and take up to `max_batch` queries of them; empty when closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            batch: list[_Pending] = []
            num_queries = 0
            while self._pending and (not batch or num_queries + len(self._pending[0].job.queries) <= self._max_batch):
                pending = self._pending.popleft()
                num_queries += len(pending.job.queries)
                batch.append(pending)
            self.num_waiting -= num_queries
            return batch

    def _work(self) -> None:
        while batch := self._take():
            self.num_batches += 1
            try:
                outcomes: list[list[Hits] | Exception] = list(self._search([pending.job for pending in batch]))
            except Exception as error:  # whatever it is, it must reach the callers, and the thread must live on
                logger.exception("a batch of %d requests failed", len(batch))
                outcomes = [error] if len(batch) == 1 else [self._search_alone(pending.job) for pending in batch]
            for loop in {pending.loop for pending in batch}:
                mine = [
                    (pending.future, outcome)
                    for pending, outcome in zip(batch, outcomes, strict=True)
                    if pending.loop is loop
                ]
                with suppress(RuntimeError):  # the loop has closed: nobody waits for the answer
                    loop.call_soon_threadsafe(_resolve, mine)

    def _search_alone(self, job: SearchJob) -> list[Hits] | Exception:
        """So that one request that fails does not fail those it was batched with."""
        try:
            return self._search([job])[0]
        except Exception as error:
            return error


def _resolve(outcomes: "list[tuple[asyncio.Future[list[Hits]], list[Hits] | Exception]]") -> None:
    for future, outcome in outcomes:
        if future.done():  # its client has gone
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
