"""Your agent as a tool of any MCP client (desktop assistants, editors): `search_and_answer`, over standard input.

{"mcpServers": {"my-documents": {"command": "python", "args": ["examples/mcp_stdio.py", "runs/own-docs"]}}}

The protocol is JSON-RPC 2.0, a message per line. Whatever else writes to standard output would break it, so that goes
to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from dgpo import Agent, __version__

PROTOCOL = "2025-06-18"
TOOL = {
    "name": "search_and_answer",
    "description": "Answers a question from the documents that this agent searches, and names its sources.",
    "inputSchema": {
        "type": "object",
        "properties": {"question": {"type": "string", "description": "one question, in words"}},
        "required": ["question"],
    },
}


def reply(agent: Agent, message: dict[str, Any]) -> dict[str, Any] | None:
    """What goes back for one message; None for a notification."""
    if "id" not in message:
        return None
    head = {"jsonrpc": "2.0", "id": message["id"]}
    method, params = message.get("method"), message.get("params") or {}
    if method == "initialize":
        about = {"name": "dgpo", "version": __version__}
        version = params.get("protocolVersion", PROTOCOL)
        return {**head, "result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}}
    if method == "ping":
        return {**head, "result": {}}
    if method == "tools/list":
        return {**head, "result": {"tools": [TOOL]}}
    if method == "tools/call" and params.get("name") == TOOL["name"]:
        return {**head, "result": call(agent, str((params.get("arguments") or {}).get("question", "")))}
    return {**head, "error": {"code": -32601, "message": f"{method} {params.get('name', '')}: not offered here"}}


def call(agent: Agent, question: str) -> dict[str, Any]:
    """The tool's result: the answer, then its sources, as text."""
    try:
        answer = agent.ask(question)
    except ValueError as error:  # a question that cannot be asked
        return {"content": [{"type": "text", "text": str(error)}], "isError": True}
    sources = "\n\n".join(f"[{i}] {each['title']}\n{each['text']}" for i, each in enumerate(answer.sources, start=1))
    text = answer.text or f"no answer was found ({answer.trajectory.status})"
    return {"content": [{"type": "text", "text": f"{text}\n\nSources:\n{sources}"}], "isError": answer.text is None}


def run(agent: Agent, lines: TextIO, out: TextIO) -> None:
    """Answers messages until the input ends."""
    for line in lines:
        if line.strip() and (answer := reply(agent, json.loads(line))) is not None:
            out.write(json.dumps(answer) + "\n")
            out.flush()


if __name__ == "__main__":
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what this process and the engine's print goes to stderr
    with Agent(sys.argv[1]) as loaded:
        run(loaded, sys.stdin, messages)
