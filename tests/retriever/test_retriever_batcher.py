import asyncio
import threading
from collections.abc import Sequence

import pytest

from retriever.batcher import Batcher
from retriever.collection import Hits, SearchJob


class HeldSearch:
    """A search that waits for `release` and records its batches; a query "bad" fails."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.started, self.release = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[SearchJob]) -> list[list[Hits]]:
        queries = [query for job in jobs for query in job.queries]
        self.batches.append(queries)
        self.started.set()
        assert self.release.wait(10)
        if "bad" in queries:
            raise RuntimeError("bad query")
        return [[Hits((len(query),), (1.0,)) for query in job.queries] for job in jobs]


def started(search: HeldSearch, *, max_batch: int, max_waiting: int) -> Batcher:
    batcher = Batcher(lambda: search, max_batch=max_batch, max_waiting=max_waiting)
    batcher.start()
    return batcher


def job(*queries: str) -> SearchJob:
    return SearchJob("c", queries, 1)


async def submit_behind(batcher: Batcher, search: HeldSearch, *jobs: SearchJob) -> list[asyncio.Future]:
    """Submit a first job that occupies the worker, then `jobs`, which wait."""
    first = batcher.submit(job("first"))
    await asyncio.to_thread(search.started.wait, 10)
    tasks = [batcher.submit(waiting) for waiting in jobs]
    await asyncio.sleep(0)
    return [first, *tasks]


async def test_what_waits_is_taken_together_up_to_the_batch_size() -> None:
    search = HeldSearch()
    batcher = started(search, max_batch=3, max_waiting=100)
    tasks = await submit_behind(batcher, search, job("a"), job("bb", "ccc"), job("dddd"), job(*"eeeee"))
    search.release.set()
    results = await asyncio.gather(*tasks)
    assert search.batches == [["first"], ["a", "bb", "ccc"], ["dddd"], list("eeeee")]
    assert [hits.rows for hits in results[2]] == [(2,), (3,)]
    batcher.close()


async def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    search = HeldSearch()
    batcher = started(search, max_batch=8, max_waiting=2)
    tasks = await submit_behind(batcher, search, job("a"), job("b"))
    with pytest.raises(asyncio.QueueFull):
        batcher.submit(job("c"))
    search.release.set()
    await asyncio.gather(*tasks)
    assert [hits.rows for hits in await batcher.submit(job("now"))] == [(3,)]
    batcher.close()


async def test_a_request_that_fails_does_not_fail_its_neighbours() -> None:
    search = HeldSearch()
    batcher = started(search, max_batch=8, max_waiting=100)
    tasks = await submit_behind(batcher, search, job("good"), job("bad"))
    search.release.set()
    _, good, bad = await asyncio.gather(*tasks, return_exceptions=True)
    assert good[0].rows == (4,)
    assert isinstance(bad, RuntimeError)
    assert (await batcher.submit(job("still")))[0].rows == (5,)
    batcher.close()


async def test_a_caller_that_goes_away_frees_its_slot() -> None:
    search = HeldSearch()
    batcher = started(search, max_batch=8, max_waiting=1)
    first, gone = await submit_behind(batcher, search, job("gone"))
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    stays = batcher.submit(job("stays"))
    await asyncio.sleep(0)
    search.release.set()
    await asyncio.gather(first, stays)
    assert search.batches == [["first"], ["stays"]]
    batcher.close()


async def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    search = HeldSearch()
    batcher = started(search, max_batch=1, max_waiting=100)
    tasks = await submit_behind(batcher, search, job("a"), job("b"))
    search.release.set()
    await asyncio.to_thread(batcher.close)
    assert len(await asyncio.gather(*tasks)) == 3
    with pytest.raises(asyncio.QueueFull):
        batcher.submit(job("late"))
