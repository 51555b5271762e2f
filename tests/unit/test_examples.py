"""The examples, against the clients that people use: OpenAI's, MCP's, and a search engine that answers like SearXNG."""

import asyncio
import contextlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dgpo.agent.search import SearchFailedError, SearchRefusedError
from dgpo.agent.trajectory import write_trajectories
from examples.episodes import Echo, play, plot, score
from examples.serve_openai import make_app
from examples.web_search import WebSearch
from tests.unit.fake_model import ChatTokenizer
from tests.unit.scripted import PROMPT_IDS, RecordingSearch, make_limits
from tests.unit.test_agent import make_agent

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "minimal_dgpo.py"})  # which is a paper


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_can_be_read_at_once(path):
    assert len(path.read_text().splitlines()) <= 80


@contextlib.contextmanager
def served(app):
    """The address at which an application is served, from a thread with a loop of its own."""
    loop, server = asyncio.new_event_loop(), TestServer(app, host="127.0.0.1")
    loop.run_until_complete(server.start_server())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield str(server.make_url("")).rstrip("/")
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(timeout=20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def chat():
    """OpenAI's own client of the example server, before an agent that is scripted."""
    openai = pytest.importorskip("openai")
    with make_agent()[0] as agent, served(make_app(agent, model="mine")) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(chat, **options):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Where is Lyon?"}]
    return chat.chat.completions.create(model="mine", messages=messages, **options)


def test_openais_client_gets_the_answer_and_its_sources(chat):
    assert [model.id for model in chat.models.list()] == ["mine"]
    completion = ask(chat)
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("Paris", "stop")
    assert [source["title"] for source in choice.sources] == ["Lyon", "France"]
    assert completion.usage.completion_tokens > 0


def test_openais_client_streams_the_answer_and_the_sources_come_last(chat):
    pieces = [chunk.choices[0] for chunk in ask(chat, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == "Paris"
    assert [source["title"] for source in pieces[-1].sources] == ["Lyon", "France"]


def test_openais_client_is_told_what_is_wrong_with_a_question(chat):
    import openai

    with pytest.raises(openai.BadRequestError, match="is empty"):
        chat.chat.completions.create(model="mine", messages=[{"role": "user", "content": " "}])


SCRIPTED_SERVER = """
import os, sys
from examples.mcp_stdio import run
from tests.unit.test_agent import make_agent
with make_agent()[0] as agent:
    run(agent, sys.stdin, sys.stdout)
"""


async def test_mcps_client_finds_the_tool_and_gets_an_answer_with_sources():
    mcp = pytest.importorskip("mcp")
    from mcp.client.stdio import stdio_client

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = mcp.StdioServerParameters(command=sys.executable, args=["-c", SCRIPTED_SERVER], env=environment)
    async with stdio_client(command) as (read, write), mcp.ClientSession(read, write) as session:
        await session.initialize()
        [tool] = (await session.list_tools()).tools
        result = await session.call_tool(tool.name, {"question": "Where is Lyon?"})
        nothing = await session.call_tool(tool.name, {"question": ""})
    assert result.content[0].text.startswith("Paris\n\nSources:\n[1] Lyon\nLyon is a city in France.")
    assert "is empty" in nothing.content[0].text


RESULTS = [
    {"url": "http://a.example/1", "title": "Lyon &amp; Rh\u00f4ne", "content": "A  city\nin France."},
    {"url": "http://a.example/2", "title": "No snippet", "content": ""},
    {"url": "http://a.example/3", "title": "More", "content": "text"},
]


def searxng(*statuses):
    """A search engine that answers with these statuses in turn, the last one from then on; it keeps its queries."""
    asked, left = [], list(statuses)

    async def search(request):
        asked.append(dict(request.query))
        status = left.pop(0) if len(left) > 1 else left[0]
        return web.json_response({"results": RESULTS}, status=status)

    app = web.Application()
    app.router.add_get("/search", search)
    return app, asked


async def found(*statuses, **options):
    app, asked = searxng(*statuses)
    async with TestServer(app) as server:
        backend = WebSearch(str(server.make_url("")), **options)
        try:
            return await backend.search("lyon", topk=2, corpus=None), asked
        finally:
            await backend.close()


async def test_pages_of_the_web_become_documents():
    documents, asked = await found(503, 200)
    assert asked == [{"q": "lyon", "format": "json", "language": "en"}] * 2
    assert documents == [
        {"id": "http://a.example/1", "contents": '"Lyon & Rh\u00f4ne"\nA city in France.'},
        {"id": "http://a.example/3", "contents": '"More"\ntext'},
    ]


async def test_a_search_engine_that_fails_is_no_empty_result():
    with pytest.raises(SearchFailedError, match="did not answer 1 times"):
        await found(503, retries=0)
    with pytest.raises(SearchRefusedError, match=r"search\.formats"):
        await found(403)


def test_episodes_are_played_written_scored_and_drawn(tmp_path):
    policy = Echo(ChatTokenizer(), "Lyon")
    episode = play(policy, RecordingSearch(), PROMPT_IDS, make_limits())
    assert (episode.answer, episode.num_searches) == ("Lyon", 1)
    episode.golds = ["lyon"]
    write_trajectories(tmp_path / "trajectories.jsonl", [episode, episode])
    numbers = score(tmp_path / "trajectories.jsonl")
    assert (numbers["em"], numbers["status"], numbers["searches"]) == (1.0, {"answered": 2}, {1: 2})
    assert plot(numbers["searches"]).count("<rect") == 1
    assert json.dumps(numbers["em_ci95"]) == "[1.0, 1.0]"
