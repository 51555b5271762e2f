"""What a user plugs in by name, and the two worked examples of docs/extending.md."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from dgpo.agent.episode import run_episode
from dgpo.agent.plugins import check_search, load_object, load_reward, make_search, open_search
from dgpo.agent.scoring import episode_reward, episode_scores
from dgpo.agent.search import SearchClient, SearchRefusedError
from dgpo.agent.trajectory import SearchRecord, Trajectory, Turn
from dgpo.config.schema import RetrieverConfig
from dgpo.errors import ConfigError
from examples.format_reward import reward as format_reward
from examples.jsonl_search import JsonlSearch
from tests.unit.scripted import PROMPT_IDS, ByteTokenizer, ScriptedPolicy, make_limits

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    {"id": "0", "contents": '"France"\nFrance : capital Paris , language French .'},
    {"id": "1", "contents": '"Peru"\nPeru : capital Lima , language Spanish .'},
    {"id": "2", "contents": '"Spain"\nSpain : capital Madrid , language Spanish .'},
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return str(path)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and returns its name."""

    def write(text):
        name = f"users_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]


def episode(answer="Lima", *, num_searches=1, invalid=0):
    record = SearchRecord(0, "capital of Peru", [DOCUMENTS[1]], 0, False, 0.1)
    return Trajectory(
        episode_id="e",
        prompt_ids=[1],
        response_ids=[2, 3],
        response_mask=[1, 1],
        log_probs=[0.0, 0.0],
        turns=[Turn(0, 2, "answer", answer)],
        searches=[record] * num_searches,
        answer=answer,
        status="answered",
        counters={"num_invalid_actions": invalid},
    )


def rewarded(reward, trajectory, golds=("Lima",)):
    return episode_reward(reward, trajectory, golds, episode_scores(trajectory, golds))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("examples.format_reward", "expected package.module:name"),
        ("examples.format_reward:", "expected package.module:name"),
        ("examples.absent:reward", "importing examples.absent failed with ModuleNotFoundError"),
        ("examples.format_reward:absent", "format_reward.py has no absent"),
    ],
)
def test_a_wrong_name_says_what_is_wrong_with_it(path, message):
    with pytest.raises(ConfigError) as caught:
        load_object(path, key="train.reward")
    assert f"train.reward={path}: " in str(caught.value)
    assert message in str(caught.value)


def test_a_module_that_fails_when_imported_is_named_with_its_error(module):
    name = module("1 / 0")
    with pytest.raises(ConfigError, match="failed with ZeroDivisionError: division by zero"):
        load_object(f"{name}:reward", key="train.reward")


def test_a_reward_with_other_arguments_is_refused(module):
    name = module("def reward(answer): ...")
    with pytest.raises(ConfigError, match=r"expected a function \(trajectory, golds, scores\)"):
        load_reward(f"{name}:reward")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine:\n    def search(self, query, *, topk, corpus): ...", "expected a class with `async def search"),
        ("class Mine: ...", "expected a class with `async def search"),
        ("class Mine:\n    async def search(self, query): ...", "unexpected keyword argument 'topk'"),
        (
            "class Mine:\n    def __init__(self, folder): ...\n    async def search(self, query, *, topk, corpus): ...",
            "missing a required argument: 'folder'",
        ),
    ],
)
def test_a_backend_that_cannot_search_is_refused_before_one_is_made(module, text, message):
    name = module(text)
    with pytest.raises(ConfigError, match=r"retriever\.backend=users_") as caught:
        check_search(RetrieverConfig(backend=f"{name}:Mine"))
    assert message in str(caught.value)


def test_without_a_backend_the_search_is_the_servers_client():
    assert isinstance(make_search(RetrieverConfig()), SearchClient)


def test_a_backend_is_made_with_its_options_and_closed_in_the_end(module):
    name = module(
        "class Mine:\n"
        "    def __init__(self, text): self.text = text\n"
        "    async def search(self, query, *, topk, corpus): return [{'id': '0', 'contents': self.text}]\n"
        "    async def close(self): self.text = None\n"
    )

    async def use():
        async with open_search(RetrieverConfig(backend=f"{name}:Mine", backend_options={"text": "x"})) as search:
            found = await search.search("q", topk=1, corpus=None)
        return found, search.text

    assert asyncio.run(use()) == ([{"id": "0", "contents": "x"}], None)


@pytest.mark.parametrize("value", [None, "1", {}, {"a": None}, [1.0], {"a": "x"}])
def test_a_reward_that_returns_no_number_is_told(value):
    with pytest.raises(ConfigError, match=r"^train.reward returned .*, expected a number, or a mapping"):
        rewarded(lambda *_: value, episode())


def test_an_async_reward_is_refused_before_anything_starts(module):
    with pytest.raises(ConfigError, match="expected a plain function, it is async"):
        load_reward(f"{module('async def reward(trajectory, golds, scores): return 1.0')}:reward")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "the search returned None, expected a list of documents"),
        ({"result": []}, "expected a list of documents"),
        (["text"], "a document 'text', expected {'id': .., 'contents': text}"),
        ([{"id": "1"}], "a document {'id': '1'}, expected"),
        ([{"id": "1", "contents": None}], "expected {'id': .., 'contents': text}"),
    ],
)
async def test_what_a_backend_returns_is_checked_where_it_enters(found, words):
    class Backend:
        async def search(self, query, *, topk, corpus):
            return found

    with pytest.raises(ConfigError) as caught:
        await run_episode(
            episode_id="e",
            prompt_ids=PROMPT_IDS,
            policy=ScriptedPolicy(["<search> q </search>"]),
            search=Backend(),
            tokenizer=ByteTokenizer(),
            limits=make_limits(),
        )
    assert words in str(caught.value)
    assert "retriever.backend" in str(caught.value)


def test_exact_match_is_the_reward_where_none_is_named():
    assert rewarded(None, episode("Lima")) == (1.0, {})
    assert rewarded(None, episode("Lima , Peru")) == (0.0, {})


def test_a_reward_of_one_number_is_its_total():
    assert rewarded(lambda trajectory, golds, scores: 2 * scores["em"], episode()) == (2.0, {"reward_total": 2.0})


def test_the_parts_of_a_reward_are_logged_and_summed():
    total, parts = rewarded(format_reward, episode("Lima", num_searches=3))
    assert parts == pytest.approx({"reward_em": 1.0, "reward_format": 0.1, "reward_searches": -0.02})
    assert total == pytest.approx(1.08)


def test_the_examples_bonus_needs_an_episode_without_invalid_action():
    assert rewarded(format_reward, episode("Cusco", invalid=1))[0] == 0.0
    assert rewarded(format_reward, episode("Cusco"))[0] == pytest.approx(0.1)


def test_the_examples_search_ranks_by_bm25(corpus):
    search = JsonlSearch(corpus)
    found = asyncio.run(search.search("Spanish in Peru", topk=2, corpus=None))
    assert [document["id"] for document in found] == ["1", "2"]
    assert asyncio.run(search.search("nothing of the kind", topk=2, corpus=None)) == []


def test_the_examples_search_knows_a_corpus_by_the_name_of_its_file(corpus):
    search = JsonlSearch(str(Path(corpus).parent))
    assert asyncio.run(search.search("Peru", topk=1, corpus="corpus")) == [DOCUMENTS[1]]
    with pytest.raises(SearchRefusedError, match=r"no corpus 'wiki' in .*: it has corpus"):
        asyncio.run(search.search("Peru", topk=1, corpus="wiki"))


def test_the_examples_weights_are_bm25s(corpus):
    # "french" stands once in one of three documents of equal length: ln(1 + 2.5 / 1.5) * 2.2 / 2.2.
    ((index, weight),) = JsonlSearch(corpus).indexes["corpus"].postings["french"]
    assert index == 0
    assert weight == pytest.approx(0.980829)


def test_the_page_names_the_examples_that_are_tested_here():
    page = (ROOT / "docs" / "extending.md").read_text()
    for name in ("format_reward", "jsonl_search"):
        assert f"../examples/{name}.py" in page
        assert (ROOT / "examples" / f"{name}.py").is_file()
