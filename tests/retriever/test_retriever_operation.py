"""What an operator relies on: liveness, readiness, metrics, the token, limits while reading, disconnects, draining."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import HeldCollection, Server, get, metrics, post, run_module, served_here, serving, started_server

from retriever.collection import Collection, LoadProgress, load_collection
from retriever.errors import RetrieverError
from retriever.options import TOKEN_VARIABLE, ServerLimits, parse_options
from retriever.service import Service


@pytest.fixture
def words(indexes: dict[str, Path]) -> HeldCollection:
    """The BM25 corpus, whose search waits for `release`."""
    return HeldCollection(load_collection({"words": indexes["words"]}))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    connection.settimeout(20)
    return connection


def request_bytes(body: bytes, *headers: str) -> bytes:
    lines = ["POST /retrieve HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_a_server_that_loads_is_alive_but_not_ready(words: HeldCollection) -> None:
    proceed = threading.Event()

    def load(progress: LoadProgress) -> Collection:
        progress("words", 0, 1)
        assert proceed.wait(30)
        return words

    words.release.set()
    service = Service(load, names=["words"], default="words", limits=ServerLimits(retry_after_s=5))
    with serving(service) as url:
        assert get(url + "/health").json == {"status": "ok"}
        waiting = get(url + "/ready")
        assert (waiting.status, waiting.headers["retry-after"]) == (503, "5")
        assert waiting.json == {
            "status": "loading",
            "detail": "loading words: 0 of 1 corpora done",
            "loaded": 0,
            "parts": 1,
        }
        for early in (post(url + "/retrieve", {"query": "rings"}), get(url + "/info")):
            assert (early.status, early.json["detail"]) == (503, "loading words: 0 of 1 corpora done")
        assert metrics(url)["retriever_ready"] == 0
        proceed.set()
        wait_until(lambda: get(url + "/ready").status == 200)
        assert get(url + "/ready").json == {"status": "ready", "loaded": 1, "parts": 1}
        assert post(url + "/retrieve", {"query": "rings"}).status == 200


def test_a_failed_load_is_told_to_probes() -> None:
    def load(_: LoadProgress) -> Collection:
        raise RetrieverError("the index is damaged")

    with serving(Service(load, names=["words"], default="words", limits=ServerLimits())) as url:
        wait_until(lambda: get(url + "/ready").json["detail"] == "loading failed: the index is damaged")
        assert post(url + "/retrieve", {"query": "rings"}).status == 503


def test_metrics_count_requests_queries_batches_and_passages(indexes: dict[str, Path]) -> None:
    with served_here(load_collection({"words": indexes["words"]}), limits=ServerLimits()) as url:
        for body in ({"queries": ["rings", "city"]}, {"query": "rings"}, {"query": " ", "topk": -1}):
            post(url + "/retrieve", body)
        post(url + "/corpora/nowhere/retrieve", {"query": "rings"})
        seen = metrics(url)
    expected = {
        'retriever_requests_total{corpus="words",status="200"}': 2,
        'retriever_requests_total{corpus="words",status="422"}': 1,
        'retriever_requests_total{corpus="",status="404"}': 1,
        "retriever_queries_total": 3,
        "retriever_cache_hits_total": 1,
        "retriever_cache_misses_total": 2,
        "retriever_batch_queries_sum": 2,
        "retriever_batch_queries_count": 1,
        "retriever_request_seconds_count": 4,
        "retriever_waiting_queries": 0,
        "retriever_dropped_queries_total": 0,
        "retriever_ready": 1,
        'retriever_passages{corpus="words"}': 12,
    }
    assert {name: seen[name] for name in expected} == expected
    assert seen["process_resident_memory_bytes"] > 1e7


@pytest.fixture(scope="module")
def guarded(indexes: dict[str, Path]) -> Iterator[str]:
    with served_here(load_collection({"words": indexes["words"]}), limits=ServerLimits(), token="s3cret") as url:
        yield url


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer s3cre", "Bearer ", "Basic s3cret", "s3cret", "Bearer é"]
)
def test_without_the_token_only_probes_and_the_manual_answer(guarded: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for refused in (
        post(guarded + "/retrieve", {"query": "rings"}, **headers),
        post(guarded + "/corpora/words/retrieve", {"query": "rings"}, **headers),
        get(guarded + "/info", **headers),
        get(guarded + "/metrics", **headers),
    ):
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json["detail"].startswith("this server needs its token")
    for path in ("/health", "/ready", "/openapi.json", "/docs"):
        assert get(guarded + path, **headers).status == 200


def test_with_the_token_everything_answers(guarded: str) -> None:
    for header in ("Bearer s3cret", "bearer s3cret"):
        assert post(guarded + "/retrieve", {"query": "rings"}, Authorization=header).status == 200
        assert get(guarded + "/info", Authorization=header).status == 200
        assert get(guarded + "/metrics", Authorization=header).status == 200
    schema = get(guarded + "/openapi.json").json
    assert schema["paths"]["/retrieve"]["post"]["security"] == [{"token": []}]
    assert schema["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def token(*arguments: str) -> str | None:
        return parse_options(["--index", "a=x", *arguments], description="").token

    assert token() is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert token() == "from-environment"
    path = tmp_path / "token"
    path.write_text("from-file\n")
    assert token("--token-file", str(path)) == "from-file"
    for unusable in ("", "two words", "ünprintable"):
        path.write_text(unusable)
        with pytest.raises(ValueError, match="holds no usable token"):
            token("--token-file", str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        token("--token-file", str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-topk", "0"], "max_topk is 0; expected at least 1"),
        (["--default-topk", "101"], "default_topk is 101, more than max_topk=100"),
    ],
)
def test_limits_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(["--index", "a=x", *arguments], description="")


def test_the_default_address_is_loopback() -> None:
    assert parse_options(["--index", "a=x"], description="").host == "127.0.0.1"


def test_a_stated_length_beyond_the_limit_is_refused_before_the_body_is_sent(server: Server) -> None:
    with connect(server.url) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: test\r\nContent-Length: 10000000000\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(server: Server) -> None:
    with connect(server.url) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        connection.sendall(2 * chunk)  # 131072 of an endless body; the limit is 100000
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_a_body_that_does_not_arrive_is_given_up(words: HeldCollection) -> None:
    with served_here(words, limits=ServerLimits(body_timeout_s=1)) as url, connect(url) as connection:
        connection.sendall(request_bytes(b'{"query": "rings"}')[:-5])
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'"text"',
        b"1e400",
        b"[" * 100_000,
        b'{"query": "\xff\xfe"}',
        b'{"query": null}',
        b'{"queries": [null]}',
        b'{"queries": [[["rings"]]]}',
        b'{"queries": {"0": "rings"}}',
        b'{"query": "rings", "topk": 1e400}',
        b'{"query": "rings", "topk": NaN}',
        b'{"query": "rings", "topk": [3]}',
        b'{"query": "' + b"a" * 10_000_000 + b'"}',
        b"\x00" * 1000,
    ],
    ids=range(16),
)
def test_hostile_bodies_get_a_4xx_with_a_message(server: Server, body: bytes) -> None:
    reply = post(server.url + "/retrieve", body)
    assert 400 <= reply.status < 500
    assert reply.json["detail"]
    assert post(server.url + "/retrieve", {"query": "planet with rings", "topk": 1}).status == 200


def test_a_topk_written_as_a_float_is_a_whole_number(server: Server) -> None:
    whole, decimal = (post(server.url + "/retrieve", b'{"query": "rings", "topk": %b}' % k) for k in (b"2", b"2.0"))
    assert (decimal.status, decimal.body) == (200, whole.body)


def test_a_request_whose_client_has_gone_is_never_searched(words: HeldCollection) -> None:
    limits = ServerLimits(max_waiting_queries=2, cache_mb=0)
    with served_here(words, limits=limits) as url, ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, url + "/retrieve", {"query": "rings"})
        assert words.started.wait(10)
        with connect(url) as gone:
            gone.sendall(request_bytes(b'{"queries": ["gone one", "gone two"]}'))
            wait_until(lambda: metrics(url)["retriever_waiting_queries"] == 2)
            assert post(url + "/retrieve", {"query": "full"}).status == 503
        wait_until(lambda: metrics(url)["retriever_waiting_queries"] == 0)
        stays = pool.submit(post, url + "/retrieve", {"query": "city"})
        wait_until(lambda: metrics(url)["retriever_waiting_queries"] == 1)
        words.release.set()
        assert [running.result().status, stays.result().status] == [200, 200]
        seen = metrics(url)
    assert words.searched == ["rings", "city"]
    assert seen["retriever_dropped_queries_total"] == 2
    assert seen['retriever_requests_total{corpus="words",status="499"}'] == 1


def test_a_search_that_fails_is_a_500_with_a_message(indexes: dict[str, Path]) -> None:
    class Broken(Collection):
        def search(self, jobs: object) -> list:
            raise RuntimeError("out of memory")

    broken = Broken(load_collection({"words": indexes["words"]}).corpora)
    with served_here(broken, limits=ServerLimits()) as url:
        reply = post(url + "/retrieve", {"query": "rings"})
        assert (reply.status, reply.json) == (
            500,
            {"detail": "the search failed (RuntimeError); the server's log says why"},
        )
        assert get(url + "/ready").status == 200


def test_sigterm_answers_what_runs_and_refuses_what_comes(indexes: dict[str, Path], tmp_path: Path) -> None:
    """Many queries in one request keep the encoder busy while the signal arrives."""
    queries = {"queries": [f"planet with {number} rings" for number in range(100)], "topk": 1}
    with (
        started_server(tmp_path / "port", f"--index=facts={indexes['facts']}", "--max-batch=8") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        running = [pool.submit(post, server.url + "/retrieve", queries | {"topk": topk}) for topk in (1, 2, 3, 4)]
        wait_until(lambda: metrics(server.url)["retriever_waiting_queries"] > 0)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            connect(server.url)
        assert [len(reply.result().json["result"]) for reply in running] == [100] * 4
        assert server.process.wait(10) == 0


def test_draining_is_bounded(words: HeldCollection) -> None:
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        with served_here(words, limits=ServerLimits(drain_s=1)) as url:
            stuck = pool.submit(post, url + "/retrieve", {"query": "rings"})
            assert words.started.wait(10)
        assert time.monotonic() - started < 6
        words.release.set()
        assert (stuck.result().status, stuck.result().json["detail"]) == (503, "the server is stopping")


def test_sigterm_while_loading_ends_at_once(indexes: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--index=facts={indexes['facts']}", "--port", str(port)]
    with started_server(tmp_path / "port", *arguments, wait=False) as server:
        url = f"http://127.0.0.1:{port}"

        def alive() -> bool:
            try:
                return get(url + "/health").status == 200
            except OSError:
                return False

        wait_until(alive)
        assert get(url + "/ready").status == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_a_load_that_fails_ends_the_server_with_one_line(indexes: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in indexes["facts"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / manifest["index"]).write_bytes(b"not an index")
    run = run_module("serve", "--port", "0", "--index", str(damaged))
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("retriever.serve: ")
    assert "Traceback" not in run.stderr
