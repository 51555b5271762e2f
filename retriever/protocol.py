"""Search-R1's wire format: a request body in, an answer's bytes out.

Request: `{"queries": [str], "topk": int | null, "return_scores": bool}`, or `{"query": str}` for one. `LENIENCIES` says
what else is taken.
Answer: `{"result": [[{"document": {"id", "contents"}, "score": float}, ..], ..]}`, one list per query; without scores
the lists hold the documents themselves.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from retriever.collection import Hits
from retriever.corpus import Corpus
from retriever.options import ServerLimits

FIELDS = ("queries", "query", "topk", "return_scores")
TOPK_AS_TEXT = r"[0-9]{1,18}"
FLAGS: dict[Any, bool] = {"true": True, "True": True, "1": True, 1: True}
FLAGS |= {"false": False, "False": False, "0": False, 0: False}
"""What `return_scores` may be; JSON's true and false are 1 and 0 here, and 1.0 is 1."""
# What is served though it is not as it should be, and how: counted in /metrics by these names
LENIENCIES = {
    "blank_query": "answered with no passages",
    "cut_query": "longer than max_query_chars: its beginning was searched",
    "replaced_characters": "half of a surrogate pair: searched with ? in its place",
    "capped_topk": "above max_topk: max_topk passages were given",
    "zero_topk": "answered with no passages",
    "converted_topk": 'text or a decimal, such as "3" or 3.0',
    "converted_return_scores": 'a number or text, such as 1 or "true"',
}
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RequestError(Exception):
    """A request that cannot be served, with the HTTP status, the message for the client, and further headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class RetrieveRequest:
    """A request that can be served.

    Attributes:
        queries: as they are searched; empty ones get an empty list.
        topk: passages for each; 0 gives empty lists.
        leniencies: how often each of `LENIENCIES` was needed.
    """

    queries: list[str]
    topk: int
    return_scores: bool
    leniencies: Mapping[str, int]


def parse_request(body: bytes, limits: ServerLimits) -> RetrieveRequest:
    """Reads and checks a request body. One query that is blank or too long does not cost the others their answers.

    Fields beyond `FIELDS` are ignored, as Search-R1's server does.

    Raises:
        RequestError: 400 for what is not JSON, 422 for a value that means nothing.
    """
    leniencies: Counter[str] = Counter()
    fields = _parse_json(body)
    if not isinstance(fields, dict):
        raise RequestError(422, f'the body is a JSON {_kind(fields)}; expected an object with "queries"')
    queries = _queries(fields)
    if len(queries) > limits.max_queries:
        raise RequestError(422, f"{len(queries)} queries in one request; at most {limits.max_queries}: send several")
    return RetrieveRequest(
        [_query(query, number, limits, leniencies) for number, query in enumerate(queries)],
        _topk(fields.get("topk"), limits, leniencies),
        _return_scores(fields.get("return_scores", False), leniencies),
        leniencies,
    )


def render_answer(corpus: Corpus, hits: Sequence[Hits], *, return_scores: bool) -> bytes:
    """The answer's JSON; passages are spliced in as they are stored, without being parsed."""
    lists = []
    for found in hits:
        documents = [corpus.raw(row) for row in found.rows]
        if return_scores:
            documents = [
                b'{"document":%b,"score":%b}' % (document, orjson.dumps(score))
                for document, score in zip(documents, found.scores, strict=True)
            ]
        lists.append(b"[" + b",".join(documents) + b"]")
    return b'{"result":[' + b",".join(lists) + b"]}"


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if LONE_SURROGATE.search(body):  # JSON of Python's own module, of text that was sampled badly
            with suppress(ValueError, RecursionError):
                return json.loads(body.decode())
        raise RequestError(400, f"the body is not valid JSON: {error}") from None


def _queries(fields: dict[str, Any]) -> list[Any]:
    queries, query = fields.get("queries"), fields.get("query")
    if (queries is None) == (query is None):
        raise RequestError(422, 'expected either "queries" (a list of strings) or "query" (one string)')
    if queries is None:
        return [query]
    if not isinstance(queries, list):
        raise RequestError(422, f'"queries" is a JSON {_kind(queries)}; expected a list of strings')
    return queries


def _query(query: Any, number: int, limits: ServerLimits, leniencies: Counter[str]) -> str:
    """A query as it is searched; empty for a blank one."""
    if not isinstance(query, str):
        raise RequestError(422, f"queries[{number}] is a JSON {_kind(query)}; expected a string")
    if len(query) > limits.max_query_chars:
        query = query.strip()[: limits.max_query_chars]  # an encoder cuts it further, to its limit of tokens
        leniencies["cut_query"] += 1
    if not query.strip():
        leniencies["blank_query"] += 1
        return ""
    try:
        query.encode()
    except UnicodeEncodeError:
        leniencies["replaced_characters"] += 1
        query = query.encode(errors="replace").decode()
    return query


def _topk(topk: Any, limits: ServerLimits, leniencies: Counter[str]) -> int:
    if topk is None:
        return limits.default_topk
    number = topk
    is_decimal = isinstance(topk, float) and topk.is_integer()  # JSON does not tell 3.0 from 3
    if is_decimal or (isinstance(topk, str) and re.fullmatch(TOPK_AS_TEXT, topk)):
        number = int(topk)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        shown = topk if isinstance(topk, int | float) else f"a JSON {_kind(topk)}"
        raise RequestError(422, f"topk is {shown}; expected null or a whole number from 0 on")
    leniencies["converted_topk"] += number is not topk
    leniencies["capped_topk"] += number > limits.max_topk
    leniencies["zero_topk"] += number == 0
    return min(number, limits.max_topk)


def _return_scores(value: Any, leniencies: Counter[str]) -> bool:
    if not isinstance(value, bool | int | float | str) or value not in FLAGS:
        raise RequestError(422, f"return_scores is a JSON {_kind(value)}; expected true or false")
    leniencies["converted_return_scores"] += not isinstance(value, bool)
    return FLAGS[value]


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
