"""The text grammar between policy and environment: prompt, tags, action parse, observation.

The texts are Search-R1's, byte for byte, odd grammar included: its checkpoints were trained on them.
"""

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
# What chat templates read besides the messages. Llama's inserts today's date: prompts would change overnight. Qwen3's,
# told not to think, writes an empty thought, where the policy is to write its own.
TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": True}

ActionKind = Literal["search", "answer", "invalid"]
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What one turn asks for: a query to `search`, a final `answer`, or neither."""

    kind: ActionKind
    content: str


def parse_action(text: str) -> Action:
    """The first complete `<search>` or `<answer>` in `text`, its content stripped; `invalid` with "" if there is none.

    `text` must be what the policy wrote in one turn: the prompt and the invalid-action text hold both tags themselves.
    """
    match = _ACTION.search(text)
    if match is None:
        return Action("invalid", "")
    return Action("search" if match[1] == "search" else "answer", match[2].strip())


def render_passages(documents: Sequence[Mapping[str, Any]]) -> str:
    """`Doc {i}(Title: {first line}) {other lines}` per document, the whole stripped; "" for no documents.

    Documents are `{"id", "contents"}`, the contents `"Title"\\ntext`; the title keeps its quotes.
    """
    lines = []
    for number, document in enumerate(documents, start=1):
        title, _, text = document["contents"].partition("\n")
        lines.append(f"Doc {number}(Title: {title}) {text}\n")
    return "".join(lines).strip()


def render_observation(passages: str) -> str:
    """What a search appends to the episode, around the output of `render_passages`."""
    return f"\n\n<information>{passages}</information>\n\n"


def normalize_question(question: str) -> str:
    """The question, stripped and with a question mark at its end."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def build_messages(question: str, template: str = SEARCH_R1_PROMPT) -> list[dict[str, str]]:
    """The conversation that asks `question`: one user message.

    Raises:
        ValueError: `template` has no `{question}`, so that every question would read the same.
    """
    if "{question}" not in template:
        raise ValueError(f"the prompt template {template[:60]!r} has no place for the question: add {{question}} to it")
    return [{"role": "user", "content": template.replace("{question}", normalize_question(question))}]


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids [P] of the prompt through the model's own chat template, up to where the policy starts to write.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: `[{"role", "content"}]`, as `build_messages` makes them.
    """
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **TEMPLATE_VARIABLES
    )
    return list(ids)
