"""The baselines that search once, or never: played by the one loop, learned from the same demonstrations."""

import asyncio

import pytest

from dgpo.agent.episode import run_episode
from dgpo.agent.modes import CLOSED_BOOK_PROMPT, MODES, RAG_PROMPT, cut_to_mode, mode_messages
from dgpo.agent.trajectory import Trajectory, Turn
from tests.unit.scripted import PROMPT_IDS, ByteTokenizer, RecordingSearch, ScriptedPolicy, make_limits

OBSERVATION = (
    '\n\n<information>Doc 1(Title: "Lyon") Lyon is a city in France.\n'
    'Doc 2(Title: "France") The capital of France is Paris.</information>\n\n'
)


def play(texts, search=None, **how):
    policy = ScriptedPolicy(texts)
    search = search or RecordingSearch()
    trajectory = asyncio.run(
        run_episode(
            episode_id="e",
            prompt_ids=PROMPT_IDS,
            policy=policy,
            search=search,
            tokenizer=ByteTokenizer(),
            limits=make_limits(),
            **how,
        )
    )
    return trajectory, policy, search


def test_rag_searches_with_the_question_and_answers_in_one_turn():
    trajectory, policy, search = play(
        ["<think>t</think><answer>Paris</answer>"], opening_query="What is the capital?", max_turns=0
    )
    assert search.queries == [("What is the capital?", 2, None)]
    assert (trajectory.status, trajectory.answer, trajectory.num_searches) == ("answered", "Paris", 1)
    num_given = trajectory.response_mask.index(1)
    assert bytes(trajectory.response_ids[:num_given]).decode() == OBSERVATION
    assert len(policy.calls) == 1


def test_a_baseline_that_searches_all_the_same_has_no_answer():
    trajectory, policy, search = play(["<search>Lyon</search>"], max_turns=0)
    assert (trajectory.status, search.queries, len(policy.calls)) == ("no_answer", [], 1)


def test_an_opening_search_that_fails_ends_the_episode():
    trajectory, policy, _ = play([], RecordingSearch(failing=True), opening_query="q", max_turns=0)
    assert (trajectory.status, trajectory.response_ids, policy.calls) == ("search_failed", [], [])


@pytest.mark.parametrize(
    ("mode", "template"), [("agent", "own"), ("rag", RAG_PROMPT), ("closed_book", CLOSED_BOOK_PROMPT)]
)
def test_each_mode_has_its_prompt(mode, template):
    messages = mode_messages(MODES[mode], "who?", [{"role": "user", "content": "own"}])
    assert messages == [{"role": "user", "content": template.replace("{question}", "who?")}]
    assert "<search>" not in messages[0]["content"]


def demonstration():
    """Two searches with what they brought (9), an invalid action (8), and the answer."""
    ids = [1, 9, 9, 2, 8, 3, 9, 9, 9, 4, 5]
    mask = [1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    turns = [
        Turn(0, 1, "search", "a"),
        Turn(3, 4, "invalid", ""),
        Turn(5, 6, "search", "b"),
        Turn(9, 11, "answer", "x"),
    ]
    return Trajectory("q#1", [7], ids, mask, [-1.0] * 11, turns, [], "x", "answered", {"n": 1}, "world")


def test_a_demonstration_is_cut_to_its_last_retrieval_and_turn_token_by_token():
    rag = cut_to_mode(demonstration(), "rag", [6, 6])
    assert (rag.prompt_ids, rag.response_ids, rag.response_mask) == ([6, 6], [9, 9, 9, 4, 5], [0, 0, 0, 1, 1])
    assert rag.turns == [Turn(3, 5, "answer", "x")]
    assert (rag.answer, rag.corpus, rag.episode_id) == ("x", "world", "q#1")


def test_without_a_search_only_the_turn_is_left():
    assert cut_to_mode(demonstration(), "closed_book", [6]).response_ids == [4, 5]
    direct = demonstration()
    direct.turns = direct.turns[-1:]
    assert cut_to_mode(direct, "rag", [6]).response_ids == [4, 5]
