import asyncio
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dgpo.agent.search import (
    MAX_RETRY_AFTER_S,
    SearchClient,
    SearchFailedError,
    SearchRefusedError,
    _Replica,
    _retry_after_s,
    check_health,
    read_token,
    split_urls,
)
from dgpo.errors import ConfigError
from dgpo.slurm.ready import retrievers_ready

DOCUMENT = {"id": "0", "contents": '"Lyon"\nLyon is a city in France.'}
ANSWER = {"result": [[{"document": DOCUMENT, "score": 0.5}]]}


class Server:
    """A real HTTP server that gives its replies in turn, then the right answer, and keeps what it was sent."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests, self.times, self.tokens, self.peers = [], [], [], set()
        self.in_flight = self.most_in_flight = 0

    async def handle(self, request):
        self.requests.append((request.path, await request.json()))
        self.times.append(time.monotonic())
        self.tokens.append(request.headers.get("Authorization"))
        self.peers.add(request.transport.get_extra_info("peername"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.replies.pop(0) if self.replies else web.json_response(ANSWER)
            return await reply(request) if callable(reply) else reply
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def serving(*replies, timeout_s=5.0, max_retries=2, max_concurrency=4, backoff_s=0.01, **options):
    server = Server(*replies)
    app = web.Application()
    app.router.add_post("/{tail:.*}", server.handle)
    async with TestServer(app) as running:
        options |= {"timeout_s": timeout_s, "max_retries": max_retries, "max_concurrency": max_concurrency}
        options.setdefault("max_queries_per_request", 1)
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
    async with SearchClient(
        url, timeout_s=1, max_retries=1, max_concurrency=1, max_queries_per_request=1, backoff_s=0.01
    ) as client:
        with pytest.raises(SearchFailedError, match=rf"{url}/retrieve failed after 2 attempts.*Connect"):
            await client.search("lyon", topk=1, corpus=None)


async def test_a_server_that_is_gone_is_waited_for():
    """It comes back after more failures than there are retries, on the same port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"timeout_s": 1, "max_retries": 1, "max_concurrency": 4, "max_queries_per_request": 1}
    options |= {"backoff_s": 0.01, "max_outage_s": 30}
    async with SearchClient(f"http://127.0.0.1:{port}", **options) as client:
        searches = [asyncio.create_task(client.search("lyon", topk=1, corpus=None)) for _ in range(2)]
        while client.num_retries < 8:
            await asyncio.sleep(0.01)
        app = web.Application()
        app.router.add_post("/{tail:.*}", Server().handle)
        async with TestServer(app, port=port):
            assert await asyncio.gather(*searches) == [[DOCUMENT], [DOCUMENT]]
        assert client.num_failed == 0


async def test_the_wait_for_a_server_that_is_gone_has_a_bound():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    options = {"timeout_s": 1, "max_retries": 0, "max_concurrency": 1, "max_queries_per_request": 1}
    options |= {"backoff_s": 0.01, "max_outage_s": 0.3}
    started = time.monotonic()
    async with SearchClient(url, **options) as client:
        with pytest.raises(SearchFailedError):
            await client.search("lyon", topk=1, corpus=None)
    assert 0.3 <= time.monotonic() - started < 2


async def test_a_server_that_answers_with_errors_is_not_gone():
    async with serving(*[web.Response(status=500) for _ in range(3)], max_outage_s=60) as (_, client):
        with pytest.raises(SearchFailedError, match="after 3 attempts"):
            await client.search("lyon", topk=1, corpus=None)


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured(status):
    async with serving(web.Response(status=status, headers={"Retry-After": "0.4"})) as (server, client):
        await client.search("lyon", topk=1, corpus=None)
    assert server.times[1] - server.times[0] >= 0.39


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, None), ("2", 2), ("-1", 0), ("86400", MAX_RETRY_AFTER_S), ("Wed, 21 Oct 2015 07:28:00 GMT", None)],
)
def test_retry_after_is_bounded(header, expected):
    assert _retry_after_s(header) == expected


async def test_waits_grow_and_differ_between_clients(monkeypatch):
    waits = []

    async def record(seconds):
        waits.append(seconds)

    async with serving(*[web.Response(status=500) for _ in range(12)], max_retries=5, backoff_s=1.0) as (_, client):
        monkeypatch.setattr("dgpo.agent.search.asyncio.sleep", record)
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


def answer(queries):
    """A document per query, with the query as its text."""
    return {"result": [[{"document": {"id": query, "contents": query}, "score": 1.0}] for query in queries]}


async def answer_by_query(request):
    return web.json_response(answer((await request.json())["queries"]))


async def test_searches_of_one_moment_share_requests_and_each_gets_its_own_documents():
    async with serving(*[answer_by_query] * 9, max_queries_per_request=3) as (server, client):
        names = [f"q{number}" for number in range(7)]
        found = await asyncio.gather(*(client.search(name, topk=1, corpus=None) for name in names))
        assert [document["contents"] for (document,) in found] == names
    assert sorted(body["queries"] for _, body in server.requests) == [names[:3], names[3:6], names[6:]]


async def test_a_server_that_takes_one_query_at_a_time_is_asked_so_and_reported(caplog):
    async with serving(web.json_response(answer(["a"])), max_queries_per_request=2) as (server, client):
        searches = [client.search(name, topk=1, corpus=None) for name in "ab"]
        assert await asyncio.gather(*searches) == [[DOCUMENT], [DOCUMENT]]
        assert [body["queries"] for _, body in server.requests][:1] == [["a", "b"]]
        assert len(server.requests) == 3
        assert client.num_retries == 2
    assert "answers 2 queries with" in caplog.text
    assert "set retriever.max_queries_per_request=1" in caplog.text


async def fail_for_bad(request):
    queries = (await request.json())["queries"]
    return web.Response(status=500) if "bad" in queries else web.json_response(answer(queries))


async def test_a_query_that_a_server_fails_at_fails_alone():
    async with serving(*[fail_for_bad] * 9, max_queries_per_request=3, max_retries=1) as (_, client):
        searches = [client.search(name, topk=1, corpus=None) for name in ("a", "bad", "c")]
        first, second, third = await asyncio.gather(*searches, return_exceptions=True)
        assert (first[0]["contents"], type(second), third[0]["contents"]) == ("a", SearchFailedError, "c")
        assert (client.num_retries, client.num_failed) == (1 + 3 + 1, 1)


async def test_searches_that_wait_for_a_request_share_its_outage():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = {"timeout_s": 1, "max_retries": 0, "max_concurrency": 1, "max_queries_per_request": 2}
    options |= {"backoff_s": 0.01, "max_outage_s": 0.5}
    started = time.monotonic()
    async with SearchClient(f"http://127.0.0.1:{port}", **options) as client:
        searches = [client.search(str(number), topk=1, corpus=None) for number in range(8)]
        errors = await asyncio.gather(*searches, return_exceptions=True)
        assert [type(error) for error in errors] == [SearchFailedError] * 8
        assert client.num_failed == 8
    assert 0.5 <= time.monotonic() - started < 1.5  # four requests, one after the other


async def test_a_closed_client_can_search_again():
    async with serving() as (_, client):
        await client.search("lyon", topk=1, corpus=None)
        await client.close()
        assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]


@asynccontextmanager
async def replicas(*reply_lists, **options):
    """Several servers with their replies in turn, and one client of all of them."""
    servers = [Server(*replies) for replies in reply_lists]
    defaults = {"timeout_s": 5.0, "max_retries": 2, "max_concurrency": 8, "backoff_s": 0.01}
    defaults["max_queries_per_request"] = 1
    async with AsyncExitStack() as stack:
        urls = []
        for server in servers:
            app = web.Application()
            app.router.add_post("/{tail:.*}", server.handle)
            urls.append(str((await stack.enter_async_context(TestServer(app))).make_url("/")))
        client = await stack.enter_async_context(SearchClient(", ".join(urls), **(defaults | options)))
        yield [*servers, client]


async def test_searches_go_to_the_server_with_the_fewest_in_flight():
    async with replicas([answer_slowly] * 8, [answer_slowly] * 8) as (left, right, client):
        await asyncio.gather(*(client.search("lyon", topk=1, corpus=None) for _ in range(8)))
        assert (left.most_in_flight, right.most_in_flight) == (4, 4)


@pytest.mark.parametrize("fault", [web.Response(status=500), drop_connection])
async def test_a_search_that_fails_is_tried_elsewhere_and_the_faulty_server_left_out(fault):
    async with replicas([fault], [], backoff_s=60.0) as (faulty, _, client):
        while not faulty.requests:  # chosen at random while both are idle
            assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]
        for _ in range(10):
            assert await client.search("lyon", topk=1, corpus=None) == [DOCUMENT]
        assert len(faulty.requests) == 1
        assert client.num_retries == 1


async def test_a_server_that_was_left_out_comes_back(monkeypatch):
    monkeypatch.setattr("dgpo.agent.search.FIRST_LEFT_OUT_S", 0.05)
    async with replicas([drop_connection], [drop_connection]) as (left, right, client):
        for _ in range(10):
            await client.search("lyon", topk=1, corpus=None)
        await asyncio.sleep(0.1)
        before = len(left.requests), len(right.requests)
        for _ in range(40):
            await client.search("lyon", topk=1, corpus=None)
        assert len(left.requests) > before[0]
        assert len(right.requests) > before[1]


async def test_an_overloaded_server_is_left_out_for_as_long_as_it_asks():
    busy = web.Response(status=503, headers={"Retry-After": "30"})
    async with replicas([busy], []) as (left, _, client):
        while not left.requests:
            await client.search("lyon", topk=1, corpus=None)
        started = time.monotonic()
        for _ in range(10):
            await client.search("lyon", topk=1, corpus=None)
        assert len(left.requests) == 1
        assert time.monotonic() - started < 5


def test_faults_of_searches_in_flight_together_count_once():
    replica = _Replica("http://a")
    for _ in range(20):
        replica.leave_out(100.0, None)
    assert (replica.num_faults, replica.out_until) == (1, 101.0)
    replica.leave_out(101.0, None)
    assert replica.out_until == 103.0  # the next fault after it came back: twice as long
    assert not replica.usable(102.9)
    assert replica.usable(103.0)
    replica.in_flight = 1
    assert not replica.usable(103.0)  # one search tries it, the others wait for the outcome


async def test_the_token_is_sent():
    async with replicas([], token="s3cret") as (server, client):
        await client.search("lyon", topk=1, corpus=None)
        assert server.tokens == ["Bearer s3cret"]


def test_urls_are_split_and_an_empty_one_is_refused():
    assert split_urls("http://a:1/, http://b:2,") == ["http://a:1", "http://b:2"]
    with pytest.raises(ValueError, match=r"retriever\.url is ' , '"):
        split_urls(" , ")


def test_the_token_is_read_from_its_file(tmp_path):
    assert read_token(None) is None
    path = tmp_path / "token"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^teacher.url_key_file=.*cannot be read"):
        read_token(str(path), key="teacher.url_key_file")
    path.unlink()
    with pytest.raises(ValueError, match=r"^retriever.token_file=.*cannot be read"):
        read_token(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_token(str(path))
    path.write_text("s3cret\n")
    assert read_token(str(path)) == "s3cret"


@asynccontextmanager
async def probed(*, corpora=None, token=None, ready=200, health=200):
    """The URL of a server that answers probes: of ours, or, without `corpora`, of another with the same protocol."""

    async def answer(request):
        path = request.path.strip("/")
        if path == "health":
            return web.json_response({"status": "ok"}, status=health)
        if corpora is None:
            return web.Response(status=404)
        if path == "ready":
            return web.json_response({"detail": "loading wiki: 0 of 1 corpora done"}, status=ready)
        allowed = token is None or request.headers.get("Authorization") == f"Bearer {token}"
        return web.json_response({"corpora": corpora} if allowed else {}, status=200 if allowed else 401)

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    async with TestServer(app) as running:
        yield str(running.make_url("/"))


async def check(*urls, **options):
    return await asyncio.to_thread(check_health, ",".join(urls), **options)


async def test_health_tells_the_corpora_that_every_server_has():
    async with probed(corpora={"a": {}, "b": {"count": 2}}) as left, probed(corpora={"b": {}, "c": {}}) as right:
        assert await check(left, right) == {"corpora": {"b": {"count": 2}}}


async def test_a_server_that_tells_no_corpora_is_healthy():
    async with probed() as url:
        assert await check(url) == {}


async def test_every_server_must_be_healthy_and_ready():
    async with probed(corpora={}) as good, probed(corpora={}, ready=503) as loading, probed(health=500) as sick:
        with pytest.raises(ConfigError, match=r"is not ready \(loading wiki: 0 of 1"):
            await check(good, loading)
        with pytest.raises(ConfigError, match="answers /health with HTTP 500"):
            await check(good, sick)
        with pytest.raises(ConfigError, match=r"no retrieval server answers at http://127\.0\.0\.1:9"):
            await check(good, "http://127.0.0.1:9", timeout_s=1)


async def test_a_missing_token_is_named_before_the_first_search():
    async with probed(corpora={"a": {}}, token="s3cret") as url:
        with pytest.raises(ConfigError, match=r"set retriever\.token_file"):
            await check(url)
        assert await check(url, token="s3cret") == {"corpora": {"a": {}}}


def test_no_server_is_one_line_that_names_the_way_out():
    with pytest.raises(ConfigError, match=r"start one with `python -m retriever.serve`") as caught:
        check_health("http://127.0.0.1:9", timeout_s=1)
    assert "http://127.0.0.1:9" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["not a url", "127.0.0.1:8124", "http://", "http://a:port", "http://[", "ftp://a", "http://a,b"]
)
def test_what_is_no_address_is_told_so(url):
    with pytest.raises(ConfigError, match="expected http://host:port, or several separated by commas"):
        check_health(url, timeout_s=1)


@asynccontextmanager
async def searching_only(status=200, answer=None):
    """The URL of a server that has /retrieve and nothing else, as Search-R1's own."""

    async def retrieve(request):
        body = await request.json()
        hit = {"document": {"id": "0", "contents": "x"}, "score": 1.0}
        given = {"result": [[hit][: body["topk"]] for _ in body["queries"]]} if answer is None else answer
        return web.json_response(given, status=status)

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    async with TestServer(app) as running:
        yield str(running.make_url("/"))


async def test_a_server_that_only_searches_is_healthy_when_it_finds():
    async with searching_only() as url, searching_only(answer={"result": [[]]}) as empty:
        assert await check(url) == {}
        assert await check(url, empty) == {}


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (500, {}, "answers a search with HTTP 500"),
        (404, {}, "answers a search with HTTP 404"),
        (200, {"results": []}, "is no retrieval server"),
        (200, {"result": [["text"]]}, "is no retrieval server"),
        (200, {"result": []}, "is no retrieval server"),
    ],
)
async def test_a_server_that_only_searches_is_refused_when_it_cannot(status, answer, message):
    async with searching_only(status, answer) as url:
        with pytest.raises(ConfigError, match=message) as refusal:
            await check(url)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
async def test_a_proxy_of_the_environment_is_not_asked(variable, monkeypatch):
    """Neither by probes nor by searches: retrievers stand on this machine or in this cluster."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    async with probed(corpora={"a": {}}) as ours, searching_only() as theirs:
        assert await check(ours) == {"corpora": {"a": {}}}
        assert await check(theirs) == {}
        assert await asyncio.to_thread(retrievers_ready, ours)
        options = {"timeout_s": 5.0, "max_retries": 0, "max_concurrency": 1, "max_queries_per_request": 1}
        async with SearchClient(theirs, **options) as client:
            assert await client.search("a", topk=1, corpus=None) == [{"id": "0", "contents": "x"}]
