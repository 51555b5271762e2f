"""What every server of the protocol does around a search: token, limits, refusals, disconnects, counts."""

import asyncio
import hmac
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from retriever.limits import ServerLimits
from retriever.metrics import Metrics
from retriever.protocol import RequestError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LINGER_S, LINGER_BYTES = 5, 64 << 20
CLIENT_GONE = 499  # never sent; it counts in the metrics, under the status that nginx made known


class Service(ABC):
    """Requests in, responses out; a subclass searches."""

    names: Sequence[str]
    """The corpora, as far as they are known."""
    default: str

    def __init__(self, *, limits: ServerLimits, token: str | None = None) -> None:
        """With a `token`, requests must carry it as `Authorization: Bearer`."""
        self.limits = limits
        self.metrics = Metrics()
        self._token = token

    @property
    def ready(self) -> bool:
        try:
            self.check_ready()
        except RequestError:
            return False
        return True

    @property
    def load_error(self) -> Exception | None:
        """Why this server will never be ready, once that is known."""
        return None

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    @abstractmethod
    async def start(self) -> None:
        """Called once, on the event loop, before the first request."""

    @abstractmethod
    async def close(self) -> None:
        """Called once, after the last request."""

    @abstractmethod
    def check_ready(self) -> None:
        """Raise `RequestError` (503) unless searches can be answered."""

    @abstractmethod
    async def search(self, request: Request, name: str, body: bytes) -> bytes:
        """The answer's bytes; raises `RequestError`, or `ClientDisconnect` when the client has gone."""

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Parts that are loaded, and all."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The content of `/info`; raises `RequestError` (503) while it is not known."""

    @abstractmethod
    def refresh_metrics(self) -> None:
        """Set the gauges that are not kept up to date all the time."""

    def check_token(self, request: Request) -> None:
        """Raise `RequestError` (401) unless the request carries the token; compared in constant time."""
        if self._token is None:
            return
        scheme, _, credential = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(credential.strip().encode(), self._token.encode()):
            raise RequestError(
                401, "this server needs its token: send Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"}
            )

    async def answer(self, request: Request, name: str | None = None) -> Response:
        """The response to one retrieve request on corpus `name` (None = the default one)."""
        started = time.perf_counter()
        kind: type[Response] = RefusalOfUnreadBody
        try:
            self.check_token(request)
            self.check_ready()
            name = self.default if name is None else name
            if name not in self.names:
                raise RequestError(404, f"no corpus {name!r}; this server has {', '.join(sorted(self.names))}")
            body = await self._read_body(request)
            kind = Response
            response = Response(await self.search(request, name, body), media_type="application/json")
        except RequestError as error:
            response = error_response(error, kind)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        known = name if name is not None and name in self.names else ""
        self.metrics.observe_request(known, response.status_code, time.perf_counter() - started)
        return response

    def ready_response(self) -> Response:
        """200 once searches can be answered; until then 503 with the progress."""
        num_loaded, num_parts = self.progress()
        content: dict[str, Any] = {"loaded": num_loaded, "parts": num_parts}
        try:
            self.check_ready()
        except RequestError as error:
            return json_response(503, {"status": "loading", "detail": str(error), **content}, dict(error.headers or {}))
        return json_response(200, {"status": "ready", **content})

    def render_metrics(self) -> bytes:
        self.refresh_metrics()
        return self.metrics.render()

    def retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.limits.retry_after_s)}

    async def while_connected(self, request: Request, work: "asyncio.Future[Result]", num_queries: int) -> Result:
        """The outcome of `work`, which is cancelled when the client disconnects or draining takes too long."""
        # After the body there is nothing to receive but the end of the connection.
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: work.cancel())
        try:
            return await work
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled():
                self.metrics.dropped.inc(num_queries)
                raise ClientDisconnect from None
            raise RequestError(503, "the server is stopping", self.retry_after()) from None
        except RequestError:
            raise
        except Exception as error:
            logger.exception("a search failed")
            raise RequestError(500, f"the search failed ({type(error).__name__}); the server's log says why") from None
        finally:
            gone.cancel()

    async def _read_body(self, request: Request) -> bytes:
        """The body, read no further and no longer than the limits; raises `RequestError` (413, 408)."""
        max_bytes, timeout_s = self.limits.max_body_bytes, self.limits.body_timeout_s
        stated = request.headers.get("content-length", "")
        too_large = RequestError(
            413,
            f"the body is larger than {max_bytes} bytes; send less",
            # Of a body without a stated length nobody knows the end: only closing the connection stops it.
            None if stated else {"Connection": "close"},
        )
        if stated.isdigit() and int(stated) > max_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise too_large
        except TimeoutError:
            detail = f"the body did not arrive in {timeout_s} s; send it faster, or in several requests"
            raise RequestError(408, detail, {"Connection": "close"}) from None
        return bytes(body)


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
