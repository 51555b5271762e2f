import asyncio
import socket
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dgpo.search import (
    MAX_RETRY_AFTER_S,
    RetrieverUnavailableError,
    SearchClient,
    SearchFailedError,
    SearchRefusedError,
    _retry_after_s,
    check_health,
)

DOCUMENT = {"id": "0", "contents": '"Lyon"\nLyon is a city in France.'}
ANSWER = {"result": [[{"document": DOCUMENT, "score": 0.5}]]}


class Server:
    """A real HTTP server that gives its replies in turn, then the right answer, and keeps what it was sent."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests, self.times, self.peers = [], [], set()
        self.in_flight = self.most_in_flight = 0

    async def handle(self, request):
        self.requests.append((request.path, await request.json()))
        self.times.append(time.monotonic())
        self.peers.add(request.transport.get_extra_info("peername"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.replies.pop(0) if self.replies else web.json_response(ANSWER)
            return await reply(request) if callable(reply) else reply
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def serving(*replies, timeout_s=5.0, max_retries=2, max_concurrency=4, backoff_s=0.01):
    server = Server(*replies)
    app = web.Application()
    app.router.add_post("/{tail:.*}", server.handle)
    async with TestServer(app) as running:
        options = {"timeout_s": timeout_s, "max_retries": max_retries, "max_concurrency": max_concurrency}
        async with SearchClient(str(running.make_url("/")), **options, backoff_s=backoff_s) as client:
            yield server, client


async def hang(_request):
    await asyncio.sleep(60)


async def answer_slowly(_request):
    await asyncio.sleep(0.2)
    return web.json_response(ANSWER)


async def drop_connection(request):
    request.transport.close()
    return web.Response()


async def test_a_search_sends_search_r1s_wire_format_and_returns_documents():
    async with serving() as (server, client):
        assert await client.search("lyon", topk=3, corpus=None) == [DOCUMENT]
    assert server.requests == [("/retrieve", {"queries": ["lyon"], "topk": 3, "return_scores": True})]


async def test_a_named_corpus_has_its_own_path():
    async with serving() as (server, client):
        await client.search("lyon", topk=3, corpus="world 3/x")
        await client.search("lyon", topk=3, corpus="world-4")
    assert [path for path, _ in server.requests] == ["/corpora/world 3/x/retrieve", "/corpora/world-4/retrieve"]


@pytest.mark.parametrize("reply", [web.Response(status=503), web.Response(status=500), drop_connection])
async def test_a_passing_fault_is_tried_again(reply):
    async with serving(reply) as (server, client):
        assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]
        assert (len(server.requests), client.num_retries, client.num_failed) == (2, 1, 0)


async def test_a_hanging_server_times_out_and_fails_after_the_retries():
    started = time.monotonic()
    async with serving(hang, hang, hang, timeout_s=0.1) as (server, client):
        with pytest.raises(SearchFailedError, match="failed after 3 attempts, the last with TimeoutError"):
            await client.search("lyon", topk=1, corpus=None)
        assert (len(server.requests), client.num_retries, client.num_failed) == (3, 2, 1)
    assert time.monotonic() - started < 5


async def test_a_hang_is_tried_again():
    async with serving(hang, timeout_s=0.2) as (_, client):
        assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]


async def test_a_server_that_is_gone_fails_after_the_retries():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with SearchClient(url, timeout_s=1, max_retries=1, max_concurrency=1, backoff_s=0.01) as client:
        with pytest.raises(SearchFailedError, match=rf"{url}/retrieve failed after 2 attempts.*Connect"):
            await client.search("lyon", topk=1, corpus=None)


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured(status):
    async with serving(web.Response(status=status, headers={"Retry-After": "0.4"})) as (server, client):
        await client.search("lyon", topk=1, corpus=None)
    assert server.times[1] - server.times[0] >= 0.39


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, 0), ("2", 2), ("-1", 0), ("86400", MAX_RETRY_AFTER_S), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after_is_bounded(header, expected):
    assert _retry_after_s(header) == expected


async def test_waits_grow_and_differ_between_clients(monkeypatch):
    waits = []

    async def record(seconds):
        waits.append(seconds)

    async with serving(*[web.Response(status=500) for _ in range(12)], max_retries=5, backoff_s=1.0) as (_, client):
        monkeypatch.setattr("dgpo.search.asyncio.sleep", record)
        for _ in range(2):
            with pytest.raises(SearchFailedError):
                await client.search("lyon", topk=1, corpus=None)
        monkeypatch.undo()
    for attempt, wait in enumerate(waits[:5]):
        full = min(2.0**attempt, 10.0)
        assert full / 2 <= wait <= full
    assert waits[:5] != waits[5:]


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_refusal_is_not_tried_again(status):
    async with serving(web.Response(status=status, text="no corpus 'x'")) as (server, client):
        with pytest.raises(SearchRefusedError, match=f"HTTP {status} no corpus 'x'.*check retriever.url"):
            await client.search("lyon", topk=1, corpus="x")
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    ["<html>", "[]", '{"result": []}', '{"result": [[{"id": "0"}]]}', '{"result": [[{"document": {"id": "0"}}]]}'],
)
async def test_an_answer_in_another_format_is_refused_not_taken_for_an_empty_one(body):
    async with serving(web.Response(text=body)) as (_, client):
        with pytest.raises(SearchRefusedError, match="expected the format"):
            await client.search("lyon", topk=1, corpus=None)


async def test_no_documents_found_is_an_answer():
    async with serving(web.json_response({"result": [[]]})) as (_, client):
        assert await client.search("lyon", topk=1, corpus=None) == []


async def test_connections_are_used_again():
    async with serving() as (server, client):
        for _ in range(5):
            await client.search("lyon", topk=1, corpus=None)
    assert len(server.peers) == 1


async def test_searches_in_flight_are_bounded_and_waiting_for_a_slot_is_no_timeout():
    async with serving(*[answer_slowly] * 8, max_concurrency=2, timeout_s=0.5) as (server, client):
        await asyncio.gather(*(client.search("lyon", topk=1, corpus=None) for _ in range(8)))
        assert (server.most_in_flight, client.num_retries) == (2, 0)


async def test_a_closed_client_can_search_again():
    async with serving() as (_, client):
        await client.search("lyon", topk=1, corpus=None)
        await client.close()
        assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]


async def answer_health(_request):
    return web.json_response({"status": "ok"})


async def test_health_is_read():
    app = web.Application()
    app.router.add_get("/health", answer_health)
    async with TestServer(app) as running:
        health = await asyncio.to_thread(check_health, str(running.make_url("/")))
    assert health == {"status": "ok"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not a url"])
def test_no_server_is_one_line_that_names_the_way_out(url):
    with pytest.raises(RetrieverUnavailableError, match=r"start one with `python -m retriever.serve`") as caught:
        check_health(url, timeout_s=1)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
