"""Batching across requests: one thread owns the device and takes whatever waits as soon as it is free.

There is no fixed wait: an idle server answers at once, and batches grow by themselves under load.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from retriever.collection import Hits, SearchJob
from retriever.errors import RetrieverError

logger = logging.getLogger(__name__)

SearchFunction = Callable[[Sequence[SearchJob]], list[list[Hits]]]
# Called on the owner thread after each batch, with its number of queries and its seconds
BatchObserver = Callable[[int, float], None]


@dataclass(eq=False)
class _Pending:
    job: SearchJob
    future: asyncio.Future[list[Hits]]
    loop: asyncio.AbstractEventLoop
    taken: bool = False


class Batcher:
    """Loads and runs a search function on one thread of its own, on the jobs that asynchronous callers submit."""

    def __init__(
        self,
        load: Callable[[], SearchFunction],
        *,
        max_batch: int,
        max_waiting: int,
        on_batch: BatchObserver | None = None,
    ) -> None:
        """`load` runs first, on the owner thread too: a GPU and its libraries are only ever touched from there.

        `max_batch` and `max_waiting` count queries; a job with more than `max_batch` runs on its own.
        """
        self._load, self._max_batch, self._max_waiting, self._on_batch = load, max_batch, max_waiting, on_batch
        self._pending: OrderedDict[_Pending, None] = OrderedDict()  # a queue that any member can leave at once
        self._changed = threading.Condition()
        self._closed = False
        self.num_waiting = 0
        self.load_error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="retriever-owner", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def submit(self, job: SearchJob) -> asyncio.Future[list[Hits]]:
        """The hits of a job, to be awaited; raises `asyncio.QueueFull` at once when too many queries wait already.

        Cancelling the future while the job waits frees its slot: it is never encoded.
        """
        loop = asyncio.get_running_loop()
        pending = _Pending(job, loop.create_future(), loop)
        with self._changed:
            if self._closed or self.num_waiting + len(job.queries) > self._max_waiting:
                raise asyncio.QueueFull
            self._pending[pending] = None
            self.num_waiting += len(job.queries)
            self._changed.notify()
        pending.future.add_done_callback(lambda _: self._release(pending))
        return pending.future

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish the jobs that wait, then end the thread; False when that takes longer than `timeout_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _release(self, pending: _Pending) -> None:
        """Free the slot of a job whose caller has gone before the worker took it."""
        if pending.taken:
            return
        with self._changed:
            if self._pending.pop(pending, pending) is None:
                self.num_waiting -= len(pending.job.queries)

    def _take(self) -> list[_Pending]:
        """Block until jobs wait, and take up to `max_batch` queries of them; empty when closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            batch: list[_Pending] = []
            num_queries = 0
            while self._pending:
                pending = next(iter(self._pending))
                if batch and num_queries + len(pending.job.queries) > self._max_batch:
                    break
                del self._pending[pending]
                pending.taken = True
                num_queries += len(pending.job.queries)
                batch.append(pending)
            self.num_waiting -= num_queries
            return batch

    def _work(self) -> None:
        try:
            search = self._load()
        except Exception as error:
            self.load_error = error
            return
        while batch := self._take():
            started = time.perf_counter()
            jobs = [pending.job for pending in batch]
            try:
                outcomes: list[list[Hits] | Exception] = list(search(jobs))
            except Exception as error:  # whatever it is, it must reach the callers, and the thread must live on
                if not isinstance(error, RetrieverError):  # that one says all in a line, where it is answered
                    logger.exception("a batch of %d requests failed", len(batch))
                outcomes = [error] if len(batch) == 1 else [_search_alone(search, job) for job in jobs]
            if self._on_batch:
                self._on_batch(sum(len(job.queries) for job in jobs), time.perf_counter() - started)
            for loop in {pending.loop for pending in batch}:
                mine = [
                    (pending.future, outcome)
                    for pending, outcome in zip(batch, outcomes, strict=True)
                    if pending.loop is loop
                ]
                with suppress(RuntimeError):  # the loop has closed: nobody waits for the answer
                    loop.call_soon_threadsafe(_resolve, mine)


def _search_alone(search: SearchFunction, job: SearchJob) -> list[Hits] | Exception:
    """So that one request that fails does not fail those it was batched with."""
    try:
        return search([job])[0]
    except Exception as error:
        return error


def _resolve(outcomes: list[tuple[asyncio.Future[list[Hits]], list[Hits] | Exception]]) -> None:
    for future, outcome in outcomes:
        if future.done():  # its client has gone
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
