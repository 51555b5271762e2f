"""Search-R1's wire format: a request body in, an answer's bytes out.

Request: `{"queries": [str], "topk": int | null, "return_scores": bool}`, or `{"query": str}` for one.
Answer: `{"result": [[{"document": {"id", "contents"}, "score": float}, ..], ..]}`, one list per query; without scores
the lists hold the documents themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from retriever.collection import Hits
from retriever.corpus import Corpus
from retriever.limits import ServerLimits

FIELDS = ("queries", "query", "topk", "return_scores")


class RequestError(Exception):
    """A request that cannot be served, with the HTTP status, the message for the client, and further headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class RetrieveRequest:
    queries: list[str]
    topk: int
    return_scores: bool


def parse_request(body: bytes, limits: ServerLimits) -> RetrieveRequest:
    """Read and check a request body; raises `RequestError` (400 not JSON, 422 a wrong value).

    Fields beyond `FIELDS` are ignored, as Search-R1's server does.
    """
    try:
        fields: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(422, f'the body is a JSON {_kind(fields)}; expected an object with "queries"')
    queries, topk, return_scores = _queries(fields), fields.get("topk"), fields.get("return_scores", False)
    if len(queries) > limits.max_queries:
        raise RequestError(422, f"{len(queries)} queries in one request; at most {limits.max_queries}: send several")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise RequestError(422, f"queries[{number}] is a JSON {_kind(query)}; expected a string")
        if len(query) > limits.max_query_chars:
            raise RequestError(
                422, f"queries[{number}] has {len(query)} characters; at most {limits.max_query_chars}: shorten it"
            )
        if not query.strip():
            raise RequestError(422, f"queries[{number}] is empty; expected text to search for")
    if topk is None:
        topk = limits.default_topk
    if isinstance(topk, float) and topk.is_integer() and abs(topk) < 2**53:
        topk = int(topk)  # JSON does not tell 3.0 from 3
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= limits.max_topk:
        shown = topk if isinstance(topk, int | float) else f"a JSON {_kind(topk)}"
        raise RequestError(422, f"topk is {shown}; expected null or an integer from 1 to {limits.max_topk}")
    if not isinstance(return_scores, bool):
        raise RequestError(422, f"return_scores is a JSON {_kind(return_scores)}; expected true or false")
    return RetrieveRequest(queries, topk, return_scores)


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


def _queries(fields: dict[str, Any]) -> list[Any]:
    queries, query = fields.get("queries"), fields.get("query")
    if (queries is None) == (query is None):
        raise RequestError(422, 'expected either "queries" (a list of strings) or "query" (one string)')
    if queries is None:
        return [query]
    if not isinstance(queries, list):
        raise RequestError(422, f'"queries" is a JSON {_kind(queries)}; expected a list of strings')
    return queries


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
