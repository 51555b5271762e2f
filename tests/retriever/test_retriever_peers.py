"""The requests that other search agents send, and what they read from the answers: each with queries gone wrong.

Written from what Search-R1, SkyRL, verl, slime and ASearcher send over the wire, in our own words. Their training loops
take a whole batch in one request and index the answer without asking, so an answer is 200, with one list per query.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Server, post, started_server

from retriever.build import build_indexes

STRANGE = {
    "empty": "",
    "blank": " \n\t\u3000 ",
    "long": "white whale " * 4000,
    "one long word": "a" * 20_000,
    "punctuation": "?!...",
    "tags": "<search> rings </search>",
    "NUL": "rings\0planet",
    "zero width": "\u200b\u200d\ufeff",
    "right to left": "\u202e\u05d0\u05d1 rings",
    "emoji": "\U0001fa90 rings",
    "CJK": "土星の輪",
    "half a surrogate pair": "rings \ud83e",
    "escapes": 'rings "quoted" \\ \x1b[31m',
    "CRLF": "rings\r\nplanet",
    "special tokens": "[CLS] rings [SEP] [PAD]",
}
GOOD = "planet with rings"
Ask = Callable[[Any], Any]


@pytest.fixture(scope="module", params=["dense", "bm25"])
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root: Path = tmp_path_factory.mktemp("peers")
    rows = [
        {"id": "0", "contents": '"Saturn"\nThe sixth planet from the Sun, famous for its rings.', "url": "w/Saturn"},
        {"id": "1", "contents": '"Moby-Dick"\nA captain hunts a white whale.', "url": "w/Moby"},
        {"id": "2", "contents": '"Osaka"\nA port city in Japan.', "url": "w/Osaka"},
    ]
    (root / "corpus.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    folder = build_indexes({"wiki": root / "corpus.jsonl"}, root / "out", method=request.param)["wiki"]
    with started_server(root / "port", f"--index={folder}") as server:
        yield lambda body: answer(server, body)


def answer(server: Server, body: Any) -> Any:
    reply = post(f"{server.url}/retrieve", body, **{"Content-Type": "application/json"})
    assert reply.status == 200, reply.body
    return reply.json


def with_neighbours(query: str) -> list[str]:
    return [GOOD, query, GOOD]


def passages(hits: list[dict[str, Any]]) -> str:
    """As Search-R1 and those that follow it write hits into the context: title, text, and nothing checked."""
    text = ""
    for number, hit in enumerate(hits):
        content = hit["document"]["contents"]
        title, rest = content.split("\n")[0], "\n".join(content.split("\n")[1:])
        text += f"Doc {number + 1}(Title: {title}) {rest}\n"
    return text


@pytest.mark.parametrize("query", STRANGE.values(), ids=STRANGE)
def test_search_r1_writes_passages_for_each_query_of_a_rollout_batch(ask: Ask, query: str) -> None:
    queries = with_neighbours(query)
    written = [passages(hits) for hits in ask({"queries": queries, "topk": 3, "return_scores": True})["result"]]
    assert len(written) == len(queries)
    assert written[0] == written[2]
    assert "famous for its rings" in written[0]


def test_search_r1_asks_for_nothing_when_nobody_searches(ask: Ask) -> None:
    assert ask({"queries": [], "topk": 3, "return_scores": True})["result"] == []


@pytest.mark.parametrize("query", STRANGE.values(), ids=STRANGE)
def test_skyrl_asks_one_query_and_joins_what_it_finds(ask: Ask, query: str) -> None:
    """One string under "query"; an answer without passages is an observation like any other."""
    [hits] = ask({"query": query, "topk": 3, "return_scores": True})["result"]
    assert isinstance(passages(hits), str)


@pytest.mark.parametrize("query", STRANGE.values(), ids=STRANGE)
def test_verl_flattens_the_lists_of_a_tool_call(ask: Ask, query: str) -> None:
    """The model gives a list of queries; every list of the answer becomes a block of text."""
    raw = ask({"queries": with_neighbours(query), "topk": 3, "return_scores": True})["result"]
    blocks = [passages(hits) for hits in raw]
    assert sum(len(hits) for hits in raw) >= 2
    assert "\n---\n".join(blocks).count("famous for its rings") >= 2


@pytest.mark.parametrize("query", STRANGE.values(), ids=STRANGE)
def test_slime_takes_the_first_list(ask: Ask, query: str) -> None:
    result = ask({"queries": [query], "topk": 3, "return_scores": True})["result"]
    contents = [{"document": {"contents": hit["document"]["contents"]}} for hit in result[0]]
    assert len(contents) <= 3


@pytest.mark.parametrize("query", STRANGE.values(), ids=STRANGE)
def test_asearcher_reads_documents_and_their_addresses(ask: Ask, query: str) -> None:
    """Without scores: the lists hold the documents, and each has the url of its corpus."""
    result = ask({"queries": with_neighbours(query), "topk": 5, "return_scores": False})["result"]
    found = [{"documents": [hit["contents"] for hit in hits], "urls": [hit["url"] for hit in hits]} for hits in result]
    assert [len(each["documents"]) for each in found] == [len(each["urls"]) for each in found]
    assert "w/Saturn" in found[0]["urls"]


@pytest.mark.parametrize("topk", [3, 3.0, "3", None, 1000])
@pytest.mark.parametrize("return_scores", [True, 1, "true", "True"])
def test_numbers_and_flags_may_come_as_the_config_of_a_peer_holds_them(ask: Ask, topk: Any, return_scores: Any) -> None:
    result = ask({"queries": [GOOD, GOOD], "topk": topk, "return_scores": return_scores, "method": "e5"})["result"]
    assert [hits[0]["document"]["id"] for hits in result] == ["0", "0"]
    assert all(isinstance(hit["score"], float) for hits in result for hit in hits)


def test_a_step_of_512_searches_with_every_fault_at_once(ask: Ask) -> None:
    queries = [query for number in range(512) for query in [list(STRANGE.values())[number % len(STRANGE)]]]
    queries[::5] = [GOOD] * len(queries[::5])
    result = ask({"queries": queries, "topk": 3, "return_scores": True})["result"]
    assert len(result) == 512
    assert all(hits[0]["document"]["id"] == "0" for hits in result[::5])
