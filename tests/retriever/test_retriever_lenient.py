"""One query that is not quite right costs the others of its request nothing, and is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Reply, Server, metrics, post

Retrieve = Callable[..., Reply]
GOOD = ["planet with rings", "city in Japan"]


def count(server: Server, kind: str) -> float:
    return metrics(server.url)[f'retriever_leniencies_total{{kind="{kind}"}}']


@pytest.mark.parametrize("corpus", ["facts", "words"])
@pytest.mark.parametrize(
    ("query", "kind"),
    [("", "blank_query"), (" \t\n\u3000", "blank_query"), (" " * 9000, "blank_query"), ("\ud800", None)],
    ids=["empty", "white space", "much white space", "half a surrogate pair"],
)
def test_the_neighbours_of_a_query_get_their_own_answers(
    retrieve: Retrieve, server: Server, corpus: str, query: str, kind: str | None
) -> None:
    [before, after] = retrieve({"queries": GOOD, "topk": 2, "return_scores": True}, corpus).json["result"]
    counted = count(server, kind or "replaced_characters")
    reply = retrieve({"queries": [GOOD[0], query, GOOD[1], query], "topk": 2, "return_scores": True}, corpus)
    assert reply.status == 200
    result = reply.json["result"]
    assert [result[0], result[2]] == [before, after]
    if kind:
        assert result[1] == result[3] == []
    assert count(server, kind or "replaced_characters") == counted + 2


def test_a_long_query_is_cut_as_the_encoder_would_cut_it(retrieve: Retrieve, server: Server) -> None:
    """1,000 characters are more than the 256 tokens that the encoder reads."""
    words = "a b c d e f g h " * 500
    counted = count(server, "cut_query")
    [long, good, cut] = retrieve({"queries": [words, GOOD[0], words[:1000]], "topk": 3, "return_scores": True}).json[
        "result"
    ]
    assert long == cut
    assert len(good) == 3
    assert count(server, "cut_query") == counted + 1


def test_white_space_in_front_does_not_use_up_a_long_query(retrieve: Retrieve) -> None:
    [[hit]] = retrieve({"query": " " * 5000 + GOOD[0], "topk": 1}).json["result"]
    assert hit["contents"].startswith('"Saturn"')


@pytest.mark.parametrize(
    ("topk", "num", "kind"),
    [
        ("3", 3, "converted_topk"),
        (3.0, 3, "converted_topk"),
        ("0003", 3, "converted_topk"),
        (21, 12, "capped_topk"),
        (10**12, 12, "capped_topk"),
        (10**30, 12, "capped_topk"),
        (1e300, 12, "capped_topk"),
        ("21", 12, "capped_topk"),
        (0, 0, "zero_topk"),
        (0.0, 0, "zero_topk"),
        ("0", 0, "zero_topk"),
    ],
)
def test_topk_means_what_it_says(retrieve: Retrieve, server: Server, topk: Any, num: int, kind: str) -> None:
    counted = count(server, kind)
    reply = retrieve({"queries": GOOD, "topk": topk})
    assert reply.status == 200
    assert [len(found) for found in reply.json["result"]] == [num, num]
    assert count(server, kind) == counted + 1


@pytest.mark.parametrize(("value", "off"), [(1, 0), (1.0, 0.0), ("true", "false"), ("True", "False"), ("1", "0")])
def test_return_scores_may_be_written_otherwise(retrieve: Retrieve, server: Server, value: Any, off: Any) -> None:
    counted = count(server, "converted_return_scores")
    body = {"queries": GOOD, "topk": 1}
    assert retrieve(body | {"return_scores": value}).body == retrieve(body | {"return_scores": True}).body
    assert retrieve(body | {"return_scores": off}).body == retrieve(body | {"return_scores": False}).body
    assert count(server, "converted_return_scores") == counted + 2


@pytest.mark.parametrize("query", [None, 3, ["a"], {"query": "a"}, True])
def test_a_query_that_is_no_text_is_named_by_its_number(retrieve: Retrieve, query: Any) -> None:
    reply = retrieve({"queries": [GOOD[0], query]})
    assert reply.status == 422
    assert reply.json["detail"].startswith("queries[1] is a JSON ")


def test_what_is_as_it_should_be_counts_nowhere(retrieve: Retrieve, server: Server) -> None:
    def counted() -> dict[str, float]:
        return {name: value for name, value in metrics(server.url).items() if name.startswith("retriever_leniencies_t")}

    before = counted()
    assert len(before) == 7
    retrieve({"queries": [*GOOD, "naïve café 東京 \U0001f600"], "topk": 20, "return_scores": True})
    retrieve({"query": GOOD[0], "topk": None, "return_scores": False})
    assert counted() == before


def test_a_lone_surrogate_is_taken_from_python_and_other_json_is_not(server: Server) -> None:
    body = json.dumps({"queries": ["rings \udcff", GOOD[0]], "topk": 1}).encode()
    assert [len(found) for found in post(server.url + "/retrieve", body).json["result"]] == [1, 1]
    for wrong in (b'{"query": "\\ud800", }', b'{"query": "\\ud800"', b"\\ud800", b'\xff{"query": "\\ud800"}'):
        assert post(server.url + "/retrieve", wrong).status == 400
