"""The same trace on a page of this machine. Served on the loopback address only, to pages of its own only."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from aiohttp import web

from dgpo.ask.asker import Asker, QuestionError, ending, sources
from dgpo.ask.trace import Piece

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 64_000
PAGE = Path(__file__).with_name("page.html")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class PageFacts:
    """What the page says before anything is asked: the model, what it searches, and questions to click."""

    model: str
    corpus: str = ""
    examples: Sequence[str] = ()


def make_app(asker: Asker, facts: PageFacts) -> web.Application:
    """`GET /` is the page; `POST /ask` {"question"} streams a JSON object per line: pieces {"kind", "text"}, then
    {"done": {"answer", "ending", "num_searches", "seconds", "sources"}} or {"error"}.
    """
    text = PAGE.read_text(encoding="utf-8")
    buttons = "".join(f'<button type="button" class="example">{escape(each)}</button>' for each in facts.examples)
    for name, value in (("model", escape(facts.model)), ("corpus", escape(facts.corpus)), ("examples", buttons)):
        text = text.replace(f"{{{{{name}}}}}", value)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_digest(text)}'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'"
    )

    async def page(_: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def ask(request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":  # a form of another site cannot send this
            raise web.HTTPUnsupportedMediaType(text="expected application/json")
        try:
            question = (await request.json())["question"]
        except (ValueError, KeyError, TypeError):
            question = None
        if not isinstance(question, str):
            raise web.HTTPBadRequest(text='expected {"question": "..."}')
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        await _stream(asker, question, response)
        await response.write_eof()
        return response

    app = web.Application(middlewares=[_own_pages_only], client_max_size=MAX_REQUEST_BYTES)
    app.add_routes([web.get("/", page), web.post("/ask", ask)])
    return app


def listen(port: int) -> socket.socket:
    """A socket of this machine's own, before anything slow is loaded; port 0 takes a free one. Raises `OSError`."""
    return socket.create_server((HOST, port))


async def serve(asker: Asker, facts: PageFacts, *, listener: socket.socket) -> None:
    """Serves until it is cancelled; prints the page's address."""
    runner = web.AppRunner(make_app(asker, facts), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        print(f"open http://{HOST}:{listener.getsockname()[1]}   (Ctrl-C ends)", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _stream(asker: Asker, question: str, response: web.StreamResponse) -> None:
    """Writes the trace as it grows; a reader that goes away ends the episode."""
    pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
    started = time.perf_counter()
    episode = asyncio.create_task(asker.ask(question, pieces.put_nowait))
    episode.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            await _write(response, {"kind": piece.kind, "text": piece.text})
        trajectory = await episode
    except QuestionError as error:
        await _write(response, {"error": str(error)})
        return
    finally:
        episode.cancel()
    done = {
        "answer": trajectory.answer,
        "ending": ending(trajectory),
        "num_searches": trajectory.num_searches,
        "seconds": round(time.perf_counter() - started, 1),
        "sources": sources(trajectory),
    }
    await _write(response, {"done": done})


async def _write(response: web.StreamResponse, record: dict[str, object]) -> None:
    await response.write(json.dumps(record).encode() + b"\n")


@web.middleware
async def _own_pages_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses requests under another name (a site that points its name here) or from another site's page."""
    name = request.host.rpartition(":")[0] or request.host
    origin = request.headers.get("Origin")
    if name not in (HOST, "localhost") or origin not in (None, f"http://{request.host}"):
        raise web.HTTPForbidden(text="this page is for its own machine")
    return await handler(request)


def _digest(page: str) -> str:
    (script,) = _SCRIPT.findall(page)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
