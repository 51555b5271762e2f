"""The page of `ask` in a real browser: examples, folded passages, stop, and the history over a reload."""

import asyncio
import threading

import pytest
from aiohttp import web

from dgpo.ask.asker import Asker
from dgpo.ask.web import PageFacts, listen, make_app
from dgpo.config.load import load_config
from tests.browser.chromium import Chromium, find_chromium
from tests.unit.fake_model import ChatTokenizer
from tests.unit.scripted import RecordingSearch, ScriptedPolicy

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")]

TURNS = ["<think>I look</think><search>Lyon</search>", "<think>Doc 2 says it</think><answer> Paris </answer>"]
FACTS = PageFacts("runs/own-docs/distill/model", "own, 1,211 passages", ["Where is Lyon?", "What is <b>it</b>?"])


class Repeating:
    """Answers every question by the script; one that says `slow` waits for as long as it is let."""

    def __init__(self):
        self.scripts, self.cancelled = {}, threading.Event()

    async def generate(self, token_ids, *, request_id, **options):
        if b"slow" in bytes(token_ids):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        policy = self.scripts.setdefault(request_id, ScriptedPolicy(TURNS))
        return await policy.generate(token_ids, request_id=request_id, **options)


@pytest.fixture
def served():
    """The address of a served page, and its policy."""
    policy, listener = Repeating(), listen(0)
    asker = Asker(load_config(["hardware=cpu"]), policy=policy, tokenizer=ChatTokenizer(), search=RecordingSearch())
    loop = asyncio.new_event_loop()

    async def start():
        runner = web.AppRunner(make_app(asker, FACTS), handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", policy
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture
def page(served, tmp_path):
    browser = Chromium(tmp_path)
    browser.visit(served[0])
    yield browser
    browser.close()


WHEN = """new Promise((done, fail) => {{ let left = 200; const look = () => {{
  const value = {test};
  if (value) done(value); else if (!left--) fail(new Error('never: {name}')); else setTimeout(look, 50);
}}; look(); }})"""


def when(page, test):
    """The value of an expression as soon as it is true."""
    return page.run(WHEN.format(test=test, name=test.replace("'", "")))


def test_an_example_is_asked_by_a_click_and_its_passages_are_folded(page):
    assert page.run("[...document.querySelectorAll('.example')].map((e) => e.textContent)") == list(FACTS.examples)
    page.run("document.querySelector('.example').click()")
    when(page, "document.querySelector('.how')")
    assert page.run("document.querySelector('article h2').textContent") == "Where is Lyon?"
    assert page.run("document.querySelector('.information summary').textContent") == "Lyon · France"
    assert page.run("document.querySelectorAll('.answer span').length") == 1
    assert page.run("[...document.querySelectorAll('details')].filter((each) => each.open).length") == 0
    assert page.errors == []


def test_the_history_outlives_a_reload_and_can_be_cleared(page, served):
    page.run("document.querySelector('.example').click()")
    when(page, "document.querySelector('.how')")
    page.visit(served[0])
    assert page.run("document.querySelector('.answer span').textContent").strip() == "Paris"
    page.run("document.getElementById('forget').click()")
    page.visit(served[0])
    assert page.run("document.querySelectorAll('article').length") == 0


def test_stop_ends_the_episode_in_the_engine_and_the_next_question_can_be_asked(page, served):
    page.run("document.getElementById('question').value = 'slow'; document.getElementById('send').click()")
    when(page, "!document.getElementById('stop').hidden")
    page.run("document.getElementById('stop').click()")
    assert when(page, "document.querySelector('.error')?.textContent") == "stopped"
    assert served[1].cancelled.wait(timeout=20)
    page.run("document.querySelector('.example').click()")
    assert when(page, "document.querySelector('.answer')") is not None
