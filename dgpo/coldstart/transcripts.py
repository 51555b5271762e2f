"""Other people's episodes as demonstrations: cut into turns and observations, and tokenised once, turn by turn.

A line of the jsonl is {"question", "golden_answers" (or "answers", "answer"), "response"}, with "id" and "stop_reason"
where there are any. The response is the whole text from the first thought to the answer, in Search-R1's tags; its
prompt is ours, in the student's chat template. Observations and the environment's text on invalid actions are masked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import INVALID_ACTION_TEXT, build_messages, encode_prompt, parse_action
from dgpo.agent.trajectory import SearchRecord, Trajectory, Turn
from dgpo.coldstart.filter import end_at_answer
from dgpo.config.schema import EpisodeConfig
from dgpo.data.lines import BadLines
from dgpo.data.questions import Question, read_answered
from dgpo.metrics.exact_match import exact_match

# What a transcript is, each of which is counted; only the first is kept.
REASONS = ("kept", "wrong", "unanswered", "truncated", "unclosed", "unasked", "too_long")
_ENVIRONMENT = re.compile(
    rf"\n*<information>.*?</information>\n*|\n?{re.escape(INVALID_ACTION_TEXT.strip())}\n?", re.DOTALL
)
_DOC = re.compile(r"^Doc \d+\s*(?:\(Title: (.*?)\))? (.*)$", re.MULTILINE)


class TranscriptError(ValueError):
    """A transcript that cannot be learnt from; `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Segment:
    """A stretch of one writer."""

    text: str
    is_policy: bool


def read_transcripts(
    path: Path, tokenizer: Any, *, limits: EpisodeConfig, bad: BadLines
) -> tuple[list[Trajectory], dict[str, int]]:
    """The transcripts of a file whose answer is an exact match, and how many there were by `REASONS`.

    Args:
        tokenizer: of the student.
        limits: prompts and responses that are longer are `too_long`.
        bad: gets lines without a question, answers or a response.
    """
    kept: list[Trajectory] = []
    counts: Counter[str] = Counter()
    for number, question, record in read_answered(path, bad):
        try:
            if record.get("stop_reason") == "length":
                raise TranscriptError("truncated")
            name = f"transcript-{number}-{question.id}"
            episode = to_trajectory(name, question, cut(record["response"]), tokenizer, limits=limits)
            kept.append(end_at_answer(episode, tokenizer))
            counts["kept"] += 1
        except TranscriptError as error:
            counts[error.reason] += 1
    return kept, {reason: counts[reason] for reason in REASONS}


def cut(response: str) -> list[Segment]:
    """Turns and observations in order, up to the first answer; what stands after it is left out.

    Raises:
        TranscriptError: `unclosed`, an observation without an end; `unasked`, one that no search asked for, or a search
            without one; `unanswered`; `truncated`, where the text breaks off inside a tag.
    """
    segments = list(_segments(response))
    for segment in segments:
        if segment.is_policy and re.search(r"</?information>", segment.text):
            raise TranscriptError("unclosed")
    kept: list[Segment] = []
    for index, segment in enumerate(segments):
        kept.append(segment)
        if not segment.is_policy:
            continue
        action = parse_action(segment.text)
        if action.kind == "answer":
            end = segment.text.index("</answer>") + len("</answer>")
            kept[-1] = Segment(segment.text[:end], True)
            return kept
        follows = segments[index + 1].text.strip() if index + 1 < len(segments) else ""
        asked = action.kind == "search" and segment.text.rstrip().endswith("</search>")
        if follows.startswith("<information>") != asked:
            raise TranscriptError("unasked" if follows else _how_it_ends(segment.text))
    raise TranscriptError(_how_it_ends(segments[-1].text if segments and segments[-1].is_policy else ""))


def to_trajectory(
    name: str, question: Question, segments: list[Segment], tokenizer: Any, *, limits: EpisodeConfig
) -> Trajectory:
    """The episode of a transcript in the student's tokens, `origin=text`, up to its answer.

    Raises:
        TranscriptError: `wrong`, the answer is no exact match; `too_long`.
    """
    answer = parse_action(segments[-1].text).content
    if not exact_match(answer, question.golds):
        raise TranscriptError("wrong")
    prompt_ids = encode_prompt(tokenizer, build_messages(question.text))
    ids: list[int] = []
    mask: list[int] = []
    turns: list[Turn] = []
    searches: list[SearchRecord] = []
    for segment in segments:
        tokens = tokenizer.encode(segment.text, add_special_tokens=False)
        if segment.is_policy:
            action = parse_action(segment.text)
            turns.append(Turn(len(ids), len(ids) + len(tokens), action.kind, action.content))
        elif turns and turns[-1].kind == "search":
            shown = segment.text.strip().removeprefix("<information>").removesuffix("</information>")
            documents = [{"id": "", "contents": f"{title}\n{text}"} for title, text in _DOC.findall(shown)]
            searches.append(SearchRecord(len(turns) - 1, turns[-1].content, documents, 0, False, 0.0))
        ids += tokens
        mask += [int(segment.is_policy)] * len(tokens)
    if len(prompt_ids) > limits.max_prompt_tokens or len(ids) > limits.max_response_tokens:
        raise TranscriptError("too_long")
    return Trajectory(
        episode_id=name,
        prompt_ids=prompt_ids,
        response_ids=ids,
        response_mask=mask,
        log_probs=[],
        turns=turns,
        searches=searches,
        answer=answer,
        status="answered",
        counters={"num_invalid_actions": sum(turn.kind == "invalid" for turn in turns)},
        question=question.text,
        golds=list(question.golds),
        origin="text",
    )


def _segments(response: str) -> Iterator[Segment]:
    position = 0
    for match in _ENVIRONMENT.finditer(response):
        if response[position : match.start()].strip():
            yield Segment(response[position : match.start()], True)
        yield Segment(match[0], False)
        position = match.end()
    if response[position:].strip():
        yield Segment(response[position:], True)


def _how_it_ends(text: str) -> str:
    """`truncated` where a tag is left open, else `unanswered`."""
    is_open = any(text.count(f"<{tag}>") > text.count(f"</{tag}>") for tag in ("think", "search", "answer"))
    return "truncated" if is_open else "unanswered"
