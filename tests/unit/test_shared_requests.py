import asyncio

import pytest

from dgpo.shared_requests import SharedRequests


class Server:
    """Answers each query with itself when `allowed` says so, and records what it is asked."""

    def __init__(self, error=None):
        self.asked = []
        self.error = error
        self.allowed = asyncio.Event()

    async def __call__(self, queries, topk, corpus):
        self.asked.append((queries, topk, corpus))
        await self.allowed.wait()
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
    assert len({id(error) for error in errors}) == 3
    assert len(server.asked) == 2


async def test_closing_gives_up_what_waits_and_what_is_in_flight():
    requests = SharedRequests(Server(), max_concurrency=1, max_queries=1)
    tasks = search(requests, "a", "b")
    await settle()
    await requests.close()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
