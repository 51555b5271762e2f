"""Responses: JSON, errors, and the refusal of a body that is still arriving."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from retriever.protocol import RequestError

LINGER_S, LINGER_BYTES = 5, 64 << 20


class RefusalOfUnreadBody(Response):
    """Answers at once, then discards the rest of the body for a while.

    Closing a connection whose client still sends resets it, and the client may never see the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while num_bytes < LINGER_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b""})


def json_response(
    status: int,
    content: dict[str, Any],
    headers: dict[str, str] | None = None,
    kind: type[Response] = Response,
) -> Response:
    return kind(orjson.dumps(content), status, headers, media_type="application/json")


def error_response(error: RequestError, kind: type[Response] = Response) -> Response:
    return json_response(error.status, {"detail": str(error)}, dict(error.headers or {}), kind)
