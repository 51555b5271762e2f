import json
import re
from pathlib import Path

import pytest

from dgpo.agent.episode import run_episode
from dgpo.agent.protocol import (
    INVALID_ACTION_TEXT,
    SEARCH_R1_PROMPT,
    Action,
    build_messages,
    encode_prompt,
    normalize_question,
    parse_action,
    render_observation,
    render_passages,
)
from tests.unit.scripted import EOS_TEXT, ByteTokenizer, RecordingSearch, ScriptedPolicy, make_limits

GOLDEN = Path(__file__).parents[1] / "golden"
PROTOCOL = json.loads((GOLDEN / "protocol.json").read_text())
EXTRACTION = json.loads((GOLDEN / "answer_extraction.json").read_text())


@pytest.mark.parametrize("case", PROTOCOL["actions"], ids=lambda case: case["text"])
def test_actions_parse_as_in_search_r1(case):
    assert parse_action(case["text"]) == Action(case["action"] or "invalid", case["content"])


@pytest.mark.parametrize("case", PROTOCOL["rendered"])
def test_passages_render_as_in_search_r1(case):
    documents = [entry["document"] for entry in case["result"]]
    assert render_passages(documents) == case["text"].strip()


def test_observations_wrap_the_rendered_passages():
    assert render_observation("{x}") == PROTOCOL["observation_template"].replace("{rendered stripped}", "{x}")


def test_a_passage_of_one_line_is_all_title():
    assert render_passages([{"id": "7", "contents": '"Lyon"'}]) == 'Doc 1(Title: "Lyon")'


def test_the_default_prompt_is_search_r1s_byte_for_byte():
    (message,) = build_messages("Whose album was Red?")
    assert message == {"role": "user", "content": EXTRACTION["prompt"]}
    assert SEARCH_R1_PROMPT.endswith("Question: {question}\n")


def test_the_invalid_action_text_is_search_r1s_byte_for_byte():
    response = EXTRACTION["cases"][3]["response"]
    assert response == f"garbage{INVALID_ACTION_TEXT}more garbage"


@pytest.mark.parametrize(("question", "expected"), [(" who? ", "who?"), ("who", "who?"), ("who ?", "who ?")])
def test_questions_end_with_a_question_mark(question, expected):
    assert normalize_question(question) == expected


def test_braces_in_a_question_are_left_alone():
    assert build_messages("what is {question} {0}", "Q: {question}")[0]["content"] == "Q: what is {question} {0}?"


def test_a_template_without_a_question_is_refused():
    with pytest.raises(ValueError, match=r"'Answer.' has no place for the question: add \{question\}"):
        build_messages("who?", "Answer.")


def test_prompts_are_encoded_with_a_fixed_date_thoughts_and_room_for_the_policy():
    class ChatTokenizer:
        def apply_chat_template(self, messages, **options):
            self.messages, self.options = messages, options
            return (1, 2, 3)

    tokenizer = ChatTokenizer()
    messages = build_messages("who?")
    assert encode_prompt(tokenizer, messages) == [1, 2, 3]
    assert tokenizer.messages == messages
    assert tokenizer.options == {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": False,
        "date_string": "26 Jul 2024",
        "enable_thinking": True,
    }


def policy_turns(response):
    """What the policy wrote of a recorded response, turn by turn."""
    environment = re.escape(INVALID_ACTION_TEXT) + r"|\n\n<information>.*?</information>\n\n"
    return re.split(environment, response, flags=re.DOTALL)


@pytest.mark.parametrize("case", EXTRACTION["cases"], ids=lambda case: case["response"][:40])
async def test_answers_come_from_policy_tokens_only(case):
    trapped = [{"id": "0", "contents": '"Red"\nsee <answer> trap </answer>'}]
    trajectory = await run_episode(
        episode_id="golden",
        prompt_ids=list(EXTRACTION["prompt"].encode()),
        policy=ScriptedPolicy([*policy_turns(case["response"]), *[EOS_TEXT] * 4]),
        search=RecordingSearch(trapped),
        tokenizer=ByteTokenizer(),
        limits=make_limits(),
        stop=("</search>",),
    )
    assert trajectory.answer == case["expected_ours"]
