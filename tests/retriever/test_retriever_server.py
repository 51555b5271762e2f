import ast
import hashlib
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    FACTS,
    QUESTIONS,
    ROOT,
    HeldCollection,
    Reply,
    Server,
    get,
    last_bits,
    metrics,
    post,
    run_module,
    served_here,
    started_server,
)

from retriever.cache import ENTRY_BYTES, LRUCache
from retriever.collection import load_collection
from retriever.options import ServerLimits

Retrieve = Callable[..., Reply]
TITLES = list(FACTS)


def document(title: str) -> dict[str, str]:
    return {"id": str(TITLES.index(title)), "contents": f'"{title}"\n{FACTS[title]}'}


def test_with_scores_every_query_gets_document_and_score(retrieve: Retrieve) -> None:
    reply = retrieve({"queries": list(QUESTIONS), "topk": 2, "return_scores": True})
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    result = reply.json["result"]
    assert [hits[0]["document"] for hits in result] == [document(title) for title in QUESTIONS.values()]
    for hits in result:
        assert [list(hit) for hit in hits] == [["document", "score"]] * 2
        assert 1 >= hits[0]["score"] >= hits[1]["score"] >= -1


def test_without_scores_every_query_gets_documents(retrieve: Retrieve) -> None:
    body = {"queries": list(QUESTIONS), "topk": 1}
    expected = {"result": [[document(title)] for title in QUESTIONS.values()]}
    assert retrieve(body).json == retrieve(body | {"return_scores": False}).json == expected


def test_a_single_query_and_a_null_topk_are_served(retrieve: Retrieve) -> None:
    reply = retrieve({"query": "planet with rings", "topk": None, "return_scores": True})
    [hits] = reply.json["result"]
    assert hits[0]["document"] == document("Saturn")
    assert len(hits) == 3
    assert reply.body == retrieve({"queries": ["planet with rings"], "return_scores": True}).body


def test_an_empty_list_gets_an_empty_result(retrieve: Retrieve) -> None:
    assert retrieve({"queries": [], "topk": 3, "return_scores": True}).body == b'{"result":[]}'


def test_named_corpora_answer_from_their_own_passages(retrieve: Retrieve) -> None:
    def first(corpus: str | None) -> str:
        return retrieve({"query": "city in Japan", "topk": 1}, corpus).json["result"][0][0]["contents"].split("\n")[0]

    assert (first(None), first("facts"), first("cities"), first("words")) == (
        '"Osaka"',
        '"Osaka"',
        '"Kobe"',
        '"Osaka"',
    )


def test_topk_beyond_the_corpus_returns_it_whole(retrieve: Retrieve) -> None:
    [hits] = retrieve({"query": "city", "topk": 20}, "cities").json["result"]
    assert sorted(hit["id"] for hit in hits) == ["0", "1"]


def test_words_without_a_match_get_an_empty_list(retrieve: Retrieve) -> None:
    assert retrieve({"query": "zzzz", "return_scores": True}, "words").json == {"result": [[]]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b'{"query": "\xff"}', 400, "not valid JSON"),
        (b"[]", 422, "JSON array"),
        ({}, 422, 'either "queries"'),
        ({"queries": ["a"], "query": "a"}, 422, 'either "queries"'),
        ({"queries": "a"}, 422, '"queries" is a JSON string'),
        ({"queries": ["a", None]}, 422, "queries[1] is a JSON null"),
        ({"queries": ["a"] * 601}, 422, "601 queries in one request; at most 600"),
        ({"query": "a", "topk": -1}, 422, "topk is -1; expected null or a whole number from 0 on"),
        ({"query": "a", "topk": -1.0}, 422, "topk is -1"),
        ({"query": "a", "topk": "-1"}, 422, "topk is a JSON string"),
        ({"query": "a", "topk": "three"}, 422, "topk is a JSON string"),
        ({"query": "a", "topk": "9" * 5000}, 422, "topk is a JSON string"),
        ({"query": "a", "topk": [3]}, 422, "topk is a JSON array"),
        (b'{"query": "a", "topk": NaN}', 400, "not valid JSON"),
        ({"query": "a", "topk": 2.5}, 422, "topk is 2.5"),
        ({"query": "a", "topk": True}, 422, "topk is"),
        ({"query": "a", "return_scores": "yes"}, 422, "return_scores is a JSON string"),
        ({"query": "a", "return_scores": 2}, 422, "return_scores is a JSON number"),
        ({"query": "a", "return_scores": None}, 422, "return_scores is a JSON null"),
        ({"query": "a", "return_scores": [1]}, 422, "return_scores is a JSON array"),
        ({"query": "a" * 100_000}, 413, "larger than 100000 bytes"),
    ],
)
def test_bad_input_gets_a_message_and_the_server_lives_on(
    retrieve: Retrieve, server: Server, body: object, status: int, message: str
) -> None:
    reply = retrieve(body)
    assert reply.status == status
    assert message in reply.json["detail"]
    assert get(server.url + "/ready").json["status"] == "ready"


def test_an_unknown_corpus_gets_404_and_the_names(retrieve: Retrieve) -> None:
    reply = retrieve({"query": "a"}, "nowhere")
    assert reply.status == 404
    assert reply.json["detail"] == "no corpus 'nowhere'; this server has cities, facts, words"


def test_info_states_what_is_served(server: Server, indexes: dict[str, Path]) -> None:
    info = get(server.url + "/info").json
    assert info["default"] == "facts"
    assert info["limits"]["max_queries"] == 600
    counts = {name: (corpus["count"], corpus["index_type"]) for name, corpus in info["corpora"].items()}
    assert counts == {"facts": (12, "Flat"), "cities": (2, "Flat"), "words": (12, "BM25")}
    facts, words = info["corpora"]["facts"], info["corpora"]["words"]
    assert (facts["encoder"]["spec"], facts["dimension"], words["encoder"]) == ("minilm", 384, None)
    stored = hashlib.sha256((indexes["facts"] / "corpus.jsonl").read_bytes()).hexdigest()
    assert facts["corpus_sha256"] == words["corpus_sha256"] == stored


def all_hits(answers: list[Any], part: str) -> list[Any]:
    """One part of every hit of every query of every answer."""
    return [hit[part] for answer in answers for found in answer for hit in found]


def test_concurrent_requests_get_the_answers_of_sequential_ones(indexes: dict[str, Path]) -> None:
    """Scores included, bit for bit (but for `last_bits`); without a cache, so that every request is searched."""
    bodies = [
        (name, {"queries": [f"{question} {number}", title], "topk": 1 + number % 3, "return_scores": True})
        for number in range(6)
        for name in indexes
        for question, title in QUESTIONS.items()
    ]
    with served_here(load_collection(indexes), limits=ServerLimits(cache_mb=0)) as url:

        def ask(body: tuple[str, object]) -> bytes:
            return post(f"{url}/corpora/{body[0]}/retrieve", body[1]).body

        sequential = [ask(body) for body in bodies]
        before = metrics(url)["retriever_batch_queries_count"]
        with ThreadPoolExecutor(16) as pool:
            concurrent = list(pool.map(ask, bodies))
        after = metrics(url)
    answers, expected = ([json.loads(body)["result"] for body in bodies] for bodies in (concurrent, sequential))
    assert all_hits(answers, "document") == all_hits(expected, "document")
    np.testing.assert_allclose(all_hits(answers, "score"), all_hits(expected, "score"), rtol=0, atol=last_bits())
    assert after["retriever_batch_queries_count"] - before < len(bodies)  # requests did share batches
    assert after["retriever_batch_queries_sum"] == after["retriever_queries_total"] == 2 * 2 * len(bodies)


def test_a_repeated_query_comes_from_the_cache(retrieve: Retrieve, server: Server) -> None:
    body = {"queries": ["a query of this test", "a query of this test"], "topk": 2, "return_scores": True}
    first = retrieve(body)
    before = metrics(server.url)
    assert retrieve(body).body == first.body
    after = metrics(server.url)
    assert after["retriever_cache_hits_total"] == before["retriever_cache_hits_total"] + 1
    assert after["retriever_batch_queries_count"] == before["retriever_batch_queries_count"]
    retrieve(body | {"topk": 3})
    retrieve(body, "cities")
    assert metrics(server.url)["retriever_cache_misses_total"] == before["retriever_cache_misses_total"] + 2


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes() -> None:
    cache: LRUCache[int] = LRUCache(2 * (ENTRY_BYTES + 4 + 100))  # two entries of one letter and 100 bytes
    for value, query in enumerate("ab"):
        cache.put(("c", query, 1), value, value_bytes=100)
    cache.get(("c", "a", 1))
    cache.put(("c", "d", 1), 3, value_bytes=100)
    assert [cache.get(("c", query, 1)) for query in "abd"] == [0, None, 3]
    cache.put(("c", "a", 1), 4, value_bytes=100)
    assert (len(cache), cache.num_bytes) == (2, 2 * (ENTRY_BYTES + 4 + 100))
    cache.put(("c", "large", 1), 5, value_bytes=10_000)
    assert len(cache) == 2
    off: LRUCache[int] = LRUCache(0)
    off.put(("c", "a", 1), 1, value_bytes=0)
    assert len(off) == 0


def test_past_the_queue_bound_requests_get_503_and_the_server_recovers(indexes: dict[str, Path]) -> None:
    held = HeldCollection(load_collection({"words": indexes["words"]}))
    limits = ServerLimits(max_waiting_queries=2, retry_after_s=7)
    with served_here(held, limits=limits) as url, ThreadPoolExecutor(3) as pool:
        running = pool.submit(post, url + "/retrieve", {"query": "rings"})
        assert held.started.wait(10)
        waiting = pool.submit(post, url + "/retrieve", {"queries": ["city", "river"]})
        while metrics(url)["retriever_waiting_queries"] < 2:
            time.sleep(0.01)
        refused = post(url + "/retrieve", {"query": "coffee"})
        held.release.set()
        assert (refused.status, refused.headers["retry-after"]) == (503, "7")
        assert refused.json == {"detail": "2 queries wait; try again in 7 s"}
        assert [len(running.result().json["result"]), len(waiting.result().json["result"])] == [1, 2]
        assert post(url + "/retrieve", {"query": "coffee"}).status == 200
        assert metrics(url)['retriever_requests_total{corpus="words",status="503"}'] == 1


def test_sigterm_ends_a_server_cleanly_and_a_taken_port_is_named(indexes: dict[str, Path], tmp_path: Path) -> None:
    with started_server(tmp_path / "port", f"--index={indexes['words']}") as server:
        assert get(server.url + "/info").json["default"] == "words"  # a bare folder is named after itself
        port = server.url.rsplit(":", 1)[1]
        second = run_module("serve", "--index", str(indexes["words"]), "--port", port)
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
        assert post(server.url + "/retrieve", {"query": "rings"}).status == 200
        server.process.terminate()
        assert server.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "a=missing"], "missing is not an index folder"),
        (["--index", "a=x", "--index", "a=y"], "the name 'a' is given twice"),
        (["--index", "a=x", "--default", "b"], "--default 'b' is not among the indexes: a"),
    ],
)
def test_a_wrong_start_is_one_line(arguments: list[str], message: str) -> None:
    run = run_module("serve", "--port", "0", *arguments)
    assert run.returncode == 1
    assert run.stderr.startswith("retriever.serve: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["serve", "build"])
def test_help_answers_in_under_two_seconds(module: str) -> None:
    started = time.perf_counter()
    assert "--" in run_module(module, "--help").stdout
    assert time.perf_counter() - started < 2


def test_the_package_imports_nothing_of_dgpo() -> None:
    for path in (ROOT / "retriever").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "dgpo" for name in names), f"{path.name} imports dgpo"


def test_answers_are_spliced_as_stored(retrieve: Retrieve, indexes: dict[str, Path]) -> None:
    stored = (indexes["facts"] / "corpus.jsonl").read_bytes().splitlines()[TITLES.index("Saturn")]
    assert retrieve({"query": "planet with rings", "topk": 1}).body == b'{"result":[[' + stored + b"]]}"
    assert json.loads(stored) == document("Saturn")
