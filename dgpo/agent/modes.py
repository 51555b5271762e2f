"""The ways in which a question is asked: by the agent, or by a baseline that searches once, or never.

    agent        Search-R1's prompt; the policy searches as it likes
    rag          the environment searches with the question itself; then one turn, which answers
    closed_book  one turn, which answers

All are played by `run_episode`, parsed by the same grammar and scored alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgpo.agent.protocol import build_messages
from dgpo.agent.trajectory import Trajectory

CLOSED_BOOK_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first. After reasoning, give "
    "the answer inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing "
    "</answer>. Question: {question}\n"
)
RAG_PROMPT = (
    "Answer the given question. Search results for it stand between <information> and </information>. You must conduct "
    "reasoning inside <think> and </think> first. After reasoning, provide the answer inside <answer> and </answer>, "
    "without detailed illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)


@dataclass(frozen=True)
class Mode:
    """How an episode is played.

    Attributes:
        template: of the prompt; None: the question's own, as the data file has it.
        searches_first: the environment searches with the question before the policy writes.
        max_turns: turns that may search, before the last one; None: `episode.max_turns`.
    """

    template: str | None = None
    searches_first: bool = False
    max_turns: int | None = None


MODES = {
    "agent": Mode(),
    "rag": Mode(RAG_PROMPT, searches_first=True, max_turns=0),
    "closed_book": Mode(CLOSED_BOOK_PROMPT, max_turns=0),
}


def mode_messages(mode: Mode, question: str, prompt: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The conversation that asks `question` in a mode; `prompt` is the question's own."""
    return list(prompt) if mode.template is None else [*build_messages(question, mode.template)]


def cut_to_mode(trajectory: Trajectory, name: str, prompt_ids: Sequence[int]) -> Trajectory:
    """An answered episode as a demonstration for a mode: its last turn, for `rag` after what its last search brought.

    Every token stays as it was sampled or read. An episode without a search has nothing before its turn in any mode.

    Args:
        prompt_ids: of the mode's prompt for the same question.
    """
    turn = trajectory.turns[-1]
    searched = [each for each in trajectory.turns[:-1] if each.kind == "search"]
    # What stands between two turns is the environment's; after an invalid action it is no evidence.
    evidence = slice(searched[-1].end, _next_start(trajectory, searched[-1].end)) if searched else slice(0, 0)
    before = trajectory.response_ids[evidence] if name == "rag" else []
    log_probs = trajectory.log_probs
    environment: list[float | None] = [0.0] * len(before)
    return Trajectory(
        episode_id=trajectory.episode_id,
        prompt_ids=list(prompt_ids),
        response_ids=before + trajectory.response_ids[turn.start : turn.end],
        response_mask=[0] * len(before) + trajectory.response_mask[turn.start : turn.end],
        log_probs=log_probs and environment + log_probs[turn.start : turn.end],
        turns=[type(turn)(len(before), len(before) + turn.end - turn.start, turn.kind, turn.content)],
        searches=trajectory.searches[-1:] if before else [],
        answer=trajectory.answer,
        status=trajectory.status,
        counters=dict(trajectory.counters),
        corpus=trajectory.corpus,
    )


def _next_start(trajectory: Trajectory, end: int) -> int:
    return min(turn.start for turn in trajectory.turns if turn.start >= end)
