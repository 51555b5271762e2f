"""Your agent behind OpenAI's chat API, for any client that speaks it: `/v1/chat/completions`, streaming or whole.

python examples/serve_openai.py runs/own-docs [port]

The answer is the message, the passages follow as `sources` in the choice (clients that do not know them ignore them),
and the model's thoughts are left out. It listens on this machine only and asks for no key: put a proxy before it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from typing import Any

from aiohttp import web

from dgpo import Agent, Answer

HOST, PORT = "127.0.0.1", 8001


def make_app(agent: Agent, *, model: str = "dgpo") -> web.Application:
    """The two routes of the API that a client needs."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "dgpo"}]})

    async def completions(request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
            question = _text([each for each in body["messages"] if each["role"] == "user"][-1]["content"])
            answer = await agent.ask_async(question)
        except (ValueError, KeyError, IndexError, TypeError) as error:  # a question that cannot be asked is one too
            return web.json_response({"error": {"message": str(error), "type": "invalid_request_error"}}, status=400)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if not body.get("stream"):
            return web.json_response({**head, "object": "chat.completion", **_whole(answer)})
        return await _stream(request, {**head, "object": "chat.completion.chunk"}, answer)

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", completions)])
    return app


def _text(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")


def _whole(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text or "I found no answer."}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "sources": answer.sources}
    written = sum(answer.trajectory.response_mask)
    read = len(answer.trajectory.prompt_ids) + len(answer.trajectory.response_ids) - written
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"choices": [choice], "usage": usage}


async def _stream(request: web.Request, head: dict[str, Any], answer: Answer) -> web.StreamResponse:
    """Word by word; the sources come with the last piece."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    words = (answer.text or "I found no answer.").split(" ")
    pieces: list[dict[str, Any]] = [{"delta": {"content": f"{' ' * (i > 0)}{word}"}} for i, word in enumerate(words)]
    pieces.append({"delta": {}, "finish_reason": "stop", "sources": answer.sources})
    for piece in pieces:
        data = {**head, "choices": [{"index": 0, "finish_reason": None, **piece}]}
        await response.write(f"data: {json.dumps(data)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


if __name__ == "__main__":
    with Agent(sys.argv[1]) as loaded:
        port = int(sys.argv[2]) if len(sys.argv) > 2 else PORT
        web.run_app(make_app(loaded), host=HOST, port=port, loop=asyncio.new_event_loop())
