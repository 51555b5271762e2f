"""ARCap of a model whose episodes have known scores, and of hand-labelled episodes."""

import json
from pathlib import Path

import pytest

from dgpo.agent.trajectory import SearchRecord, Trajectory, read_trajectories
from dgpo.engines.episode_runner import PlannedEpisode
from dgpo.errors import DataError
from dgpo.evaluation.arcap import arcap, gold_observation, score_arcap
from dgpo.evaluation.arcap_chart import DIMENSIONS, arcap_section
from tests.unit.fake_model import FakeModel, fake_config, make_question, use_model
from tests.unit.scripted import ByteTokenizer

SHELF = {"good": ['"A"\nthe rose is red'], "second": ['"B"\nskies are blue'], "poor": ['"C"\nnothing here']}


def gold(text):
    return [{"id": "g", "contents": f'"Gold"\n{text}'}]


QUESTIONS = [
    make_question(0, "red", gold_passages=gold("g0 red")),
    make_question(1, "blue", gold_passages=gold("g1 blue")),
    make_question(2, "green", gold_passages=gold("g2 green")),
    make_question(3, "Grey"),
]
SCRIPT = {  # question -> turns: forced answer, with evidence, ordinary
    "Q0": (
        ["red</answer>"],
        ["<think>t</think><answer>red</answer>"],
        ["<search>good</search>", "<answer>red</answer>"],
    ),
    "Q1": (
        ["red</answer>"],
        ["<think>more</think><search>second</search>", "<answer>blue</answer>"],
        ["<search>poor</search>", "<search>second</search>", "<answer>no</answer>"],
    ),
    "Q2": (["green, and no end"], ["<answer>no</answer>"], ["<answer>green</answer>"]),
    "Q3": ([], [], ["<search>poor</search>", "<answer>grey</answer>"]),
}


def reply(text, _):
    forced, evidence, ordinary = SCRIPT[text[:2]]
    given = '"Gold"' in text
    if given and text.endswith("<answer>"):
        return forced[0]
    searched = text.count("<search>")
    return (evidence if given else ordinary)[searched]


@pytest.fixture
def model(monkeypatch):
    model = FakeModel(reply)
    use_model(monkeypatch, model)
    return model


def run(config):
    arcap(config)
    return json.loads((Path(config.run_dir) / "arcap" / "arcap.json").read_text())


def test_a_scripted_model_gets_the_scores_that_its_episodes_deserve(model, tmp_path):
    measured = run(fake_config(tmp_path, {"own": QUESTIONS}, SHELF))["models"]["mine"]
    at_once, evidence = measured["source_referencing"]["own"], measured["using_evidence"]["own"]
    assert (at_once["em"], at_once["num_questions"]) == (pytest.approx(1 / 3), 3), "Q2 never closed its answer"
    assert (evidence["em"], evidence["num_questions"]) == (pytest.approx(2 / 3), 3)
    rewriting, when = measured["query_rewriting"]["own"], measured["when_to_search"]["own"]
    assert (rewriting["hit"], rewriting["num_questions"]) == (1 / 4, 4), "Q1's first query misses, Q2 has none"
    assert (when["hit"], when["num_searches"]) == (2 / 4, 1.0)
    assert all(len(part["own"][f"{m}_ci95"]) == 2 for part, m in ((measured["when_to_search"], "hit"),))


def test_gold_passages_and_the_forced_answer_are_the_environments_tokens(model, tmp_path):
    config = fake_config(tmp_path, {"own": QUESTIONS[:1]}, SHELF)
    run(config)
    episodes = {
        t.episode_id: t for t in read_trajectories(Path(config.run_dir) / "arcap" / "mine" / "trajectories.jsonl")
    }
    given = '\n\n<information>Doc 1(Title: "Gold") g0 red</information>\n\n'
    expected = {"at_once": given + "<answer>", "evidence": given, "episode": ""}
    for task, opening in expected.items():
        trajectory = episodes[f"own/{task}/own-test-0"]
        num_given = trajectory.response_mask.index(1)
        assert bytes(trajectory.response_ids[:num_given]).decode() == opening
        assert trajectory.prompt_ids == list(b"Q0 ?\n")


def test_the_report_draws_what_the_stage_writes(model, tmp_path):
    page = arcap_section(run(fake_config(tmp_path, {"own": QUESTIONS}, SHELF)), pair=None)
    assert page.count("<td>0.333") == 1
    assert "searches per episode, own</td><td>1.00" in page


def test_a_set_without_gold_passages_is_measured_by_what_it_allows_and_that_is_said(model, tmp_path, capsys):
    config = fake_config(tmp_path, {"own": QUESTIONS, "bare": QUESTIONS[3:]}, SHELF)
    measured = run(config)["models"]["mine"]
    assert {dimension: list(sets) for dimension, sets in measured.items() if dimension in DIMENSIONS} == {
        "source_referencing": ["own"],
        "using_evidence": ["own"],
        "query_rewriting": ["own", "bare"],
        "when_to_search": ["own", "bare"],
    }
    assert measured["query_rewriting"]["bare"]["num_questions"] == 1
    assert "bare has no gold passages" in capsys.readouterr().out


def test_the_papers_numbers_stand_beside_its_pairs_rows(model, tmp_path, capsys):
    config = fake_config(tmp_path, {"nq": [{**row, "data_source": "nq"} for row in QUESTIONS]}, SHELF)
    config.test.models = {"dgpo": config.test.models["mine"]}
    config.student.path, config.teacher.path = (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct",
    )
    arcap(config)
    table = capsys.readouterr().out
    assert "/ 0.565" in table
    assert "/ 0.593" in table


def test_a_finished_model_is_not_played_again_and_samples_are_averaged(model, tmp_path):
    config = fake_config(tmp_path, {"own": QUESTIONS}, SHELF)
    config.test.samples = 2
    first = run(config)
    assert first["models"]["mine"]["using_evidence"]["own"] == {
        "em": pytest.approx(2 / 3),
        "em_ci95": [0.0, 1.0],
        "num_questions": 3,
    }
    turns, config.resume = model.num_turns, True
    assert run(config) == first
    assert model.num_turns == turns


def labelled(golds, *searches, answer):
    """An episode by hand: the contents that each search brought."""
    records = [
        SearchRecord(i, f"query {i}", [{"id": "0", "contents": text}], 0, False, 0.0) for i, text in enumerate(searches)
    ]
    trajectory = Trajectory("e", [1], [2], [1], [0.0], [], records, answer, "answered" if answer else "no_answer")
    return trajectory, PlannedEpisode("e", make_question(0, *golds), [1], "e")


@pytest.mark.parametrize(
    ("golds", "searches", "answer", "expected", "raw"),
    [
        (["Paris"], ["The capital is Paris."], "paris", (1, 1, 1), (1, 1)),
        (["Paris"], ["Lyon", "PARIS!"], "Lyon", (0, 0, 1), (0, 0)),  # raw hits are case-sensitive
        (["art"], ["a party"], None, (0, 0, 0), (1, 1)),  # and stand inside words
        (["Paris"], [], "Paris", (1, 0, 0), (0, 0)),
        (["U.S.A."], ["in the USA today"], "usa", (1, 1, 1), (0, 0)),
    ],
)
def test_hand_labelled_episodes(golds, searches, answer, expected, raw):
    score = score_arcap(*labelled(golds, *searches, answer=answer))
    assert (score["em"], score["first_hit"], score["hit"]) == expected
    assert score["num_searches"] == len(searches)
    score = score_arcap(*labelled(golds, *searches, answer=answer), raw_hits=True)
    assert (score["first_hit"], score["hit"]) == raw


def test_gold_passages_that_are_too_long_are_cut_alike_and_too_many_are_refused():
    row = make_question(0, "x", gold_passages=[{"id": str(i), "contents": f'"T"\n{"long " * 100}'} for i in range(2)])
    text = gold_observation(row, ByteTokenizer(), max_tokens=200)
    assert len(text.encode()) <= 200
    assert text.count("long") >= 10
    assert text.endswith("</information>\n\n")
    with pytest.raises(DataError, match="2 gold passages of 'Q0 \\?' do not fit into 40 tokens"):
        gold_observation(row, ByteTokenizer(), max_tokens=40)
