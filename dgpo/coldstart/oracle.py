"""Scripted demonstrations: a policy that knows the golds, and plays the one episode loop on what is really found.

    <think> I should look this up. </think> <search> the question </search>
    <information> what the retriever returns </information>
    <think> Doc 2 says: "... the sentence with the gold ..." </think> <answer> gold </answer>

It searches as often as the question has hops: first for the question, then for the title of each gold passage that
what was read so far names. Where the golds stand in nothing that it found, it gives up, so that the episode is kept out
and counted as a miss: a student that learns such an answer would learn to make answers up.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo.agent.episode import Generation
from dgpo.agent.seeds import derive_seed
from dgpo.data.rows import row_gold_passages, row_golds, row_hops, row_question
from dgpo.engines.episode_runner import PlannedEpisode

GIVES_UP = "<think> This does not answer the question. </think>\n<answer> </answer>"
MAX_QUOTE_WORDS = 24
# Wordings are drawn by episode, so that a student learns what to do and not one sentence.
FIRST_THOUGHTS = (
    "I need to find out: {question}",
    "I do not know this. Let me search for it.",
    "Let me look this up.",
    "I should search for the facts that this question asks for.",
)
NEXT_THOUGHTS = (
    "This is about {title}. I should look that up next.",
    "I still need to know more about {title}.",
)
EVIDENCE = ('Doc {number} says: "{quote}"', 'According to Doc {number}, "{quote}"', 'In Doc {number}: "{quote}"')
_FILLER = re.compile(
    "a|an|the|is|are|was|were|be|been|do|does|did|has|have|had|of|in|on|at|to|for|by|with|from|and|or|which|who|whom|"
    "whose|what|when|where|why|how|that|this|it|its|there|please|tell|me|can|you|name|find",
    re.IGNORECASE,
)
_DOC = re.compile(r"^Doc (\d+)\(Title: (.*?)\) (.*)$", re.MULTILINE)
_INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)


class OraclePolicy:
    """Plays planned episodes by script. Token in, token out: it reads what it is shown as any policy does.

    Args:
        tokenizer: of the student.
        planned: the episodes, by whose rows it knows golds, hops and gold passages.
        seed: of the wordings.
    """

    def __init__(self, tokenizer: Any, planned: Sequence[PlannedEpisode], *, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.planned = {episode.episode_id: episode for episode in planned}

    async def __aenter__(self) -> OraclePolicy:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """The next turn of the script; an answer is followed by the end-of-sequence token. No log-probs."""
        episode = self.planned[request_id]
        response = self.tokenizer.decode(token_ids[len(episode.prompt_ids) :], skip_special_tokens=False)
        rng = random.Random(derive_seed(self.seed, "oracle", request_id))
        text = next_turn(episode.row, _INFORMATION.findall(response), rng=rng)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids += [self.tokenizer.eos_token_id] * text.endswith("</answer>")
        return Generation(ids[:max_tokens], [], "stop" if len(ids) <= max_tokens else "length")


@dataclass(frozen=True)
class Evidence:
    """Where an answer stands: the passage's number, the words around it, the answer as it is written there."""

    number: int
    quote: str
    answer: str


def next_turn(row: Mapping[str, Any], found: Sequence[str], *, rng: random.Random) -> str:
    """The text of the next turn, given what each search so far has shown.

    Args:
        row: of the question.
        found: the text of each observation, in order.
        rng: of the episode, in the same state at every turn.
    """
    first, evidence_wording, shorten = rng.choice(FIRST_THOUGHTS), rng.choice(EVIDENCE), rng.random() < 0.5
    next_wording = rng.choice(NEXT_THOUGHTS)
    question = row_question(row)
    if not found:
        query = keywords(question) if shorten else question.rstrip("? ")
        return _search(first.format(question=question), query)
    if len(found) < (row_hops(row) or 1):
        read = " ".join([question, *found])
        title = _next_title(row, read)
        if title:
            query = f"{title} {keywords(question)}" if shorten else title
            return _search(next_wording.format(title=title), query)
    evidence = find_evidence(found, row_golds(row), _gold_titles(row))
    if evidence is None:
        return GIVES_UP
    thought = evidence_wording.format(number=evidence.number, quote=evidence.quote)
    return f"<think> {thought} </think>\n<answer> {evidence.answer} </answer>"


def keywords(question: str) -> str:
    """The question's words without those that nearly every question has; all of them where none would be left."""
    words = question.rstrip("? ").split()
    kept = [word for word in words if not _FILLER.fullmatch(word.strip(",.'\""))]
    return " ".join(kept or words)


def find_evidence(found: Sequence[str], golds: Sequence[str], titles: Sequence[str] = ()) -> Evidence | None:
    """The first gold that stands, on word boundaries, in a shown passage; None where none does.

    Args:
        found: observations; the last search comes first, then its ranks in order.
        titles: of annotated passages, which come before all others.
    """
    shown = [document for text in reversed(found) for document in _DOC.findall(text)]
    shown.sort(key=lambda document: document[1].strip('"') not in titles)
    for number, title, passage in shown:
        for gold in golds:
            for where in (passage, title.strip('"')):
                match = re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", where, re.IGNORECASE)
                if match:
                    return Evidence(int(number), _quote(where, match), match[0])
    return None


def _quote(text: str, match: re.Match[str]) -> str:
    """The sentence around a match, cut to its nearest `MAX_QUOTE_WORDS` words."""
    words = list(re.finditer(r"\S+", text))
    inside = [i for i, word in enumerate(words) if word.end() > match.start() and word.start() < match.end()]
    first, last = inside[0], inside[-1]
    while first > 0 and last - first + 1 < MAX_QUOTE_WORDS // 2 and not _ends(words[first - 1][0]):
        first -= 1
    while last + 1 < len(words) and last - first + 1 < MAX_QUOTE_WORDS and not _ends(words[last][0]):
        last += 1
    return text[words[first].start() : words[last].end()]


def _ends(word: str) -> bool:
    return word.endswith((".", "!", "?"))


def _next_title(row: Mapping[str, Any], read: str) -> str | None:
    """The title of a gold passage that was named in what was read, and was not found yet."""
    named = [title for title in _gold_titles(row) if title.lower() in read.lower()]
    return next((title for title in named if f'(Title: "{title}")' not in read), None)


def _gold_titles(row: Mapping[str, Any]) -> list[str]:
    return [passage["contents"].partition("\n")[0].strip('"') for passage in row_gold_passages(row)]


def _search(thought: str, query: str) -> str:
    return f"<think> {thought} </think>\n<search> {query} </search>"
