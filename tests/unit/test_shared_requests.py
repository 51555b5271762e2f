import asyncio

import pytest

from dgpo.agent.shared_requests import SharedRequests


class Server:
    """Answers each query with itself when `allowed` says so, and records what it is asked."""

    def __init__(self, error=None):
        self.asked, self.num_cancelled = [], 0
        self.error = error
        self.allowed = asyncio.Event()

    async def __call__(self, queries, topk, corpus, began):
        self.asked.append((queries, topk, corpus))
        try:
            await self.allowed.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error:
            raise self.error
        return [[{"id": query, "contents": query}] for query in queries]


def search(requests, *queries, topk=1, corpus=None):
    return [asyncio.create_task(requests.search(query, topk=topk, corpus=corpus)) for query in queries]


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_waits_for_a_slot_goes_together():
    server = Server()
    requests = SharedRequests(server, max_concurrency=1, max_queries=8)
    tasks = search(requests, "a")
    await settle()
    for query in "bcd":
        tasks += search(requests, query)
        await settle()
    assert server.asked == [(["a"], 1, None)]
    server.allowed.set()
    found = await asyncio.gather(*tasks)
    assert [document["id"] for (document,) in found] == list("abcd")
    assert [queries for queries, _, _ in server.asked] == [["a"], ["b", "c", "d"]]


async def test_a_request_is_of_one_corpus_and_one_number_of_documents_and_no_corpus_waits_for_another():
    server = Server()
    requests = SharedRequests(server, max_concurrency=1, max_queries=2)
    tasks = [*search(requests, "a", "b", "c"), *search(requests, "d", topk=2), *search(requests, "e", corpus="other")]
    server.allowed.set()
    await asyncio.gather(*tasks)
    assert server.asked == [(["a", "b"], 1, None), (["d"], 2, None), (["e"], 1, "other"), (["c"], 1, None)]


async def test_a_search_that_was_given_up_is_not_sent_and_leaves_the_others_alone():
    server = Server()
    requests = SharedRequests(server, max_concurrency=1, max_queries=8)
    first, second, third, fourth = search(requests, "a", "b") + search(requests, "c", "d", topk=2)
    await settle()
    first.cancel()  # in flight
    third.cancel()  # waiting
    server.allowed.set()
    assert (await second)[0]["id"] == "b"
    assert (await fourth)[0]["id"] == "d"
    assert [queries for queries, _, _ in server.asked] == [["a", "b"], ["d"]]


async def test_an_error_reaches_every_search_of_the_request_and_the_next_request_is_sent():
    server = Server(ValueError("no such corpus"))
    requests = SharedRequests(server, max_concurrency=1, max_queries=2)
    tasks = search(requests, "a", "b", "c")
    server.allowed.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["no such corpus"] * 3
    assert len(server.asked) == 2


async def test_each_search_raises_its_own_outcome_and_a_missing_one_is_an_error_of_all():
    outcomes = [[{"id": "a"}], KeyError("b")]

    async def answer(queries, topk, corpus, began):
        return outcomes

    requests = SharedRequests(answer, max_concurrency=1, max_queries=2)
    first, second = await asyncio.gather(*search(requests, "a", "b"), return_exceptions=True)
    assert (first, repr(second)) == ([{"id": "a"}], "KeyError('b')")
    outcomes.pop()
    errors = await asyncio.gather(*search(requests, "a", "b"), return_exceptions=True)
    assert [str(error) for error in errors] == ["1 answers to 2 queries: expected one each"] * 2


async def test_a_request_is_given_up_when_all_its_searches_are():
    server = Server()
    requests = SharedRequests(server, max_concurrency=1, max_queries=2)
    first, second, third = search(requests, "a", "b", "c")
    await settle()
    first.cancel()
    await settle()
    assert server.num_cancelled == 0
    second.cancel()
    await settle()
    assert server.num_cancelled == 1
    server.allowed.set()
    assert (await third)[0]["id"] == "c"


async def test_as_many_requests_as_allowed_are_in_flight():
    server = Server()
    requests = SharedRequests(server, max_concurrency=2, max_queries=1)
    tasks = search(requests, "a", "b", "c")
    await settle()
    assert len(server.asked) == 2
    server.allowed.set()
    await asyncio.gather(*tasks)
    assert [queries for queries, _, _ in server.asked] == [["a"], ["b"], ["c"]]


def test_limits_below_one_are_refused():
    for limits in ({"max_concurrency": 0, "max_queries": 1}, {"max_concurrency": 1, "max_queries": 0}):
        with pytest.raises(ValueError, match="expected at least 1 each"):
            SharedRequests(Server(), **limits)


async def test_closing_gives_up_what_waits_and_what_is_in_flight():
    requests = SharedRequests(Server(), max_concurrency=1, max_queries=1)
    tasks = search(requests, "a", "b")
    await settle()
    await requests.close()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
