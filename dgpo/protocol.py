"""The text grammar between policy and environment: prompt, tags, action parse, observation (Search-R1's, byte for byte)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
INVALID_ACTION_TEXT = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I "
    "want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
STOP_STRINGS = ("</search>", "</answer>")
TEMPLATE_DATE = "26 Jul 2024"  # Llama's template inserts today's date, which would change prompts from day to day

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    kind: Literal["search", "answer", "invalid"]
    content: str


def parse_action(text: str) -> Action:
    """The first complete `<search>` or `<answer>` of one turn's generated text; `content` is "" if there is none."""
    match = _ACTION.search(text)
    if match is None:
        return Action("invalid", "")
    return Action("search" if match[1] == "search" else "answer", match[2].strip())


def render_passages(documents: Sequence[Mapping[str, Any]]) -> str:
    """`Doc {i}(Title: {first line}) {other lines}` per document, stripped. Documents are `{"id", "contents"}`."""
    lines = []
    for number, document in enumerate(documents, start=1):
        title, _, text = document["contents"].partition("\n")
        lines.append(f"Doc {number}(Title: {title}) {text}\n")
    return "".join(lines).strip()


def render_observation(passages: str) -> str:
    return f"\n\n<information>{passages}</information>\n\n"


def normalize_question(question: str) -> str:
    """Stripped, with a question mark at its end."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def build_messages(question: str, template: str = SEARCH_R1_PROMPT) -> list[dict[str, str]]:
    """One user message; `template` holds `{question}` once."""
    return [{"role": "user", "content": template.replace("{question}", normalize_question(question))}]


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Prompt token ids through the model's own chat template."""
    return list(
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, date_string=TEMPLATE_DATE
        )
    )
