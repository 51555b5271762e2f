"""`from dgpo import Agent`: answers with sources, in threads and in event loops, and importing stays light."""

import asyncio
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dgpo
from dgpo import Agent, Answer
from dgpo.ask.asker import QuestionError
from dgpo.errors import ConfigError
from dgpo.runs.asking import write_asking
from tests.unit.fake_model import ChatTokenizer, FakeModel
from tests.unit.scripted import RecordingSearch
from tests.unit.stubs import make_model

ROOT = Path(__file__).parents[2]


def reply(text: str, _: object) -> str:
    if "Doc 1(" not in text:
        return "<think>I look</think><search>Lyon</search>"
    return "<answer> Paris </answer>"


def make_agent(**changes):
    search = RecordingSearch()
    options = {"policy": FakeModel(reply), "tokenizer": ChatTokenizer(), "search": search, "settings": ["hardware=cpu"]}
    return Agent("model", **{**options, **changes}), search


def test_an_answer_has_a_text_sources_and_the_whole_episode():
    agent, search = make_agent()
    with agent:
        answer = agent.ask("Where is Lyon?")
    assert isinstance(answer, Answer)
    assert answer.text == "Paris"
    assert [source["title"] for source in answer.sources] == ["Lyon", "France"]
    assert (answer.trajectory.question, answer.trajectory.status) == ("Where is Lyon?", "answered")
    assert search.queries == [("Lyon", 3, None)]


def test_many_questions_are_answered_side_by_side_in_their_order():
    playing, most = 0, 0

    class Slow(FakeModel):
        async def generate(self, token_ids, **options):
            nonlocal playing, most
            playing += 1
            most = max(most, playing)
            await asyncio.sleep(0.02)
            playing -= 1
            return await super().generate(token_ids, **options)

    agent, _ = make_agent(policy=Slow(reply))
    with agent:
        answers = agent.ask_many([f"question {i}" for i in range(5)])
    assert [answer.trajectory.question for answer in answers] == [f"question {i}" for i in range(5)]
    assert most == 5


async def test_it_works_inside_an_event_loop_and_tells_its_trace():
    kinds = []
    agent, _ = make_agent()
    async with agent:
        answer = await agent.ask_async("Where is Lyon?", on_piece=lambda piece: kinds.append(piece.kind))
    assert answer.text == "Paris"
    assert kinds == ["think", "search", "information", "answer"]


def test_settings_hold_and_faults_are_told_as_on_the_command_line(tmp_path):
    agent, search = make_agent(settings=["hardware=cpu", "episode.topk=1", "ask.mode=rag"])
    with agent, pytest.raises(QuestionError, match="is empty"):
        agent.ask(" ")
    assert search.queries == []
    with pytest.raises(ConfigError, match="unknown config key"), make_agent(settings=["episode.top=1"])[0]:
        pass
    with pytest.raises(ConfigError, match="no retrieval server answers"):
        Agent(make_model(tmp_path / "model"), settings=["hardware=cpu"], search="http://127.0.0.1:9").ask("who?")


def test_a_policy_of_ones_own_takes_no_settings_of_the_latest_run(tmp_path, monkeypatch):
    """As `bash scripts/quickstart.sh` leaves one: with the limits of its tiny world, an answer would not fit."""
    write_asking(tmp_path / "runs" / "quickstart", overrides=["episode.topk=1"], model="m", corpus="wiki", examples=[])
    monkeypatch.chdir(tmp_path)
    agent, search = make_agent()
    with agent:
        agent.ask("Where is Lyon?")
    assert search.queries == [("Lyon", 3, None)]


def test_importing_dgpo_loads_nothing_until_the_agent_is_wanted():
    script = "import sys, dgpo; light = len([m for m in sys.modules if m.startswith('dgpo')]); print(light, dgpo.Agent)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("1 <class 'dgpo.ask.agent.Agent'>")
    with pytest.raises(AttributeError, match="has no attribute 'Agnt'"):
        _ = dgpo.Agnt


def test_the_installed_package_is_found_beside_a_clone_of_the_same_name(tmp_path):
    """`import dgpo` in the folder that holds the clone: a path entry wins over a folder without __init__.py."""
    script = f"import setuptools.build_meta as build; print(build.build_editable({str(tmp_path)!r}))"
    clone = tmp_path / "home" / "dgpo"
    (clone / "dgpo").mkdir(parents=True)
    (clone / "retriever").mkdir()
    for package in ("dgpo", "retriever"):
        (clone / package / "__init__.py").write_text((ROOT / package / "__init__.py").read_text())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (clone / name).write_text((ROOT / name).read_text())
    subprocess.run([sys.executable, "-c", script], cwd=clone, capture_output=True, check=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -I: neither PYTHONPATH nor the installed packages' folders stand in the way; then what a fresh site has.
    code = (
        f"import site, sys; sys.path.insert(0, ''); site.addsitedir({str(site)!r}); import dgpo; print(dgpo.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=clone.parent, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == str(clone / "dgpo" / "__init__.py"), found.stderr
