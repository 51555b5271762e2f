"""compat=upstream: the release's faults, on recorded cases."""

import json
from pathlib import Path

import pytest

from dgpo.agent.protocol import INVALID_ACTION_TEXT, parse_action
from dgpo.evaluation.upstream import count_searches, drop_incomplete_batch, extract_answer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "answer_extraction.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["extracted"]))
def test_the_releases_parse_is_reproduced_on_recorded_cases(case):
    assert extract_answer(GOLDEN["prompt"] + case["response"]) == case["extracted"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["extracted"]))
def test_our_parse_differs_from_it_where_the_record_says_so(case):
    """Ours sees a turn of the policy at a time, and nothing that the environment wrote."""
    response = case["response"]
    if "<information>" in response:
        before, _, after = response.partition("\n\n<information>")
        turns = [before, after.partition("</information>\n\n")[2]]
    else:
        turns = response.split(INVALID_ACTION_TEXT)
    actions = [parse_action(turn) for turn in turns]
    answers = [action.content for action in actions if action.kind == "answer"]
    assert (answers[0] if answers else None) == case["expected_ours"]


def test_without_any_answer_in_the_prompt_either_there_is_none():
    assert extract_answer("who? <think> hm") is None


def test_searches_are_tags_but_the_prompts_one():
    assert count_searches(GOLDEN["prompt"]) == 0
    assert count_searches(GOLDEN["prompt"] + "<search>a</search> .. <search>never executed") == 2
    assert count_searches(GOLDEN["prompt"] + INVALID_ACTION_TEXT) == INVALID_ACTION_TEXT.count("<search>")


def test_the_papers_sets_in_batches_of_256_lose_one_question_of_bamboogle():
    sizes = {"nq": 3610, "triviaqa": 11313, "popqa": 14267, "hotpotqa": 7405}
    sizes |= {"2wikimultihopqa": 12576, "musique": 2417, "bamboogle": 125}
    kept = drop_incomplete_batch({name: range(size) for name, size in sizes.items()}, 256)
    assert {name: len(items) for name, items in kept.items()} == {**sizes, "bamboogle": 124}
    assert kept["bamboogle"] == list(range(124))


def test_a_set_that_loses_everything_is_left_out():
    assert drop_incomplete_batch({"a": "abc", "b": "d"}, 3) == {"a": ["a", "b", "c"]}
