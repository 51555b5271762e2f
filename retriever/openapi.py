"""What the OpenAPI page says of requests, answers and errors; the server's limits are part of it."""

from __future__ import annotations

from typing import Any

from retriever.options import ServerLimits
from retriever.protocol import FLAGS, TOPK_AS_TEXT

JsonSchema = dict[str, Any]

DOCUMENT: JsonSchema = {
    "type": "object",
    "required": ["id", "contents"],
    "properties": {"id": {"type": "string"}, "contents": {"type": "string", "description": '"Title"\\ntext'}},
}
SCORED_DOCUMENT: JsonSchema = {
    "type": "object",
    "required": ["document", "score"],
    "properties": {"document": DOCUMENT, "score": {"type": "number"}},
}
ERROR: JsonSchema = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}

STATUS_MEANINGS = {
    400: "the body is not JSON in UTF-8",
    401: "the server has a token and the request does not carry it",
    404: "no such corpus",
    408: "the body did not arrive in time",
    413: "the body is larger than the server takes",
    422: "a wrong value, or one beyond the server's limits",
    503: "indexes are still loading, or too many queries wait; Retry-After says in how many seconds to come back",
}


def request_body(limits: ServerLimits) -> JsonSchema:
    """The request body of a retrieve operation, as OpenAPI."""
    text = {
        "type": "string",
        "description": f"a blank one gets an empty list; one of more than {limits.max_query_chars} characters is cut, "
        "as is one of more tokens than the encoder takes",
    }
    options: JsonSchema = {
        "topk": {
            "description": f"at most {limits.max_topk} are given; 0 gives empty lists, null {limits.default_topk}",
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": f"^{TOPK_AS_TEXT}$"},
                {"type": "null"},
            ],
        },
        "return_scores": {
            "anyOf": [{"type": "boolean"}, {"enum": list(FLAGS)}],
            "default": False,
        },
    }
    many = {"type": "array", "items": text, "maxItems": limits.max_queries}
    kinds = [
        {
            "title": "queries",
            "type": "object",
            "required": ["queries"],
            "properties": {"queries": many, "query": {"type": "null"}, **options},
        },
        {
            "title": "query",
            "type": "object",
            "required": ["query"],
            "properties": {"query": text, "queries": {"type": "null"}, **options},
        },
    ]
    example = {"queries": ["capital of France"], "topk": 3, "return_scores": True}
    content = {"application/json": {"schema": {"oneOf": kinds}, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def security(needs_token: bool) -> JsonSchema:
    """The token of an operation, where the server has one."""
    return {"security": [{"token": []}]} if needs_token else {}


def add_security_scheme(schema: JsonSchema) -> None:
    """Define, in a whole OpenAPI schema, the token that `security` refers to."""
    schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}


def retrieve_responses() -> dict[int | str, dict[str, Any]]:
    hits = {"type": "array", "items": {"anyOf": [SCORED_DOCUMENT, DOCUMENT]}}
    result: JsonSchema = {
        "type": "object",
        "required": ["result"],
        "properties": {"result": {"type": "array", "items": hits}},
    }
    return {
        200: _json("one list per query, best first: documents with scores, or documents alone", result),
        **error_responses(400, 401, 404, 408, 413, 422, 503),
    }


def ready_responses() -> dict[int | str, dict[str, Any]]:
    state: JsonSchema = {
        "type": "object",
        "required": ["status", "loaded", "parts"],
        "properties": {
            "status": {"enum": ["ready", "loading", "rewritten"]},
            "detail": {"type": "string"},
            "loaded": {"type": "integer"},
            "parts": {"type": "integer", "description": "corpora"},
        },
    }
    return {200: _json("all corpora are loaded", state), 503: _json("still loading, and how far", state)}


def info_responses() -> dict[int | str, dict[str, Any]]:
    corpus: JsonSchema = {
        "type": "object",
        "required": ["count", "index_type", "dimension", "encoder", "corpus_sha256"],
        "properties": {
            "count": {"type": "integer", "description": "passages"},
            "index_type": {"type": "string", "description": "BM25, or FAISS's name such as Flat or HNSW32_SQ8"},
            "dimension": {"type": ["integer", "null"]},
            "encoder": {"type": ["object", "null"], "description": "all that decides its vectors; null for words"},
            "corpus_sha256": {"type": "string"},
        },
    }
    info: JsonSchema = {
        "type": "object",
        "required": ["default", "corpora", "limits"],
        "properties": {
            "default": {"type": "string", "description": "the corpus behind /retrieve"},
            "corpora": {"type": "object", "additionalProperties": corpus},
            "limits": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
    }
    return {200: _json("what is served", info), **error_responses(401, 503)}


def metrics_responses() -> dict[int | str, dict[str, Any]]:
    described = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: described, **error_responses(401)}


def health_responses() -> dict[int | str, dict[str, Any]]:
    schema: JsonSchema = {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}}
    return {200: _json("the process answers; it may still be loading", schema)}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _json(STATUS_MEANINGS[status], ERROR) for status in statuses}


def _json(description: str, schema: JsonSchema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
