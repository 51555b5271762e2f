"""Phase 1a, second half: keep the teacher's correct episodes, each up to its answer, and count what is dropped."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dgpo.agent.protocol import parse_action
from dgpo.agent.trajectory import Trajectory
from dgpo.metrics.exact_match import exact_match

TAIL, APPENDED = "num_dropped_tail_tokens", "num_appended_end_tokens"  # counters of an episode


def keep_correct(
    trajectories: Sequence[Trajectory], golds: Mapping[str, Sequence[str]]
) -> tuple[list[Trajectory], dict[str, int]]:
    """The episodes whose answer is an exact match, in their order.

    Args:
        golds: accepted answers by `episode_id`.

    Returns:
        The kept episodes, and how many were `kept`, answered `wrong`, or ended without an answer (by status).
    """
    reasons = {trajectory.episode_id: _reason(trajectory, golds[trajectory.episode_id]) for trajectory in trajectories}
    kept = [trajectory for trajectory in trajectories if reasons[trajectory.episode_id] == "kept"]
    counts = Counter(reasons.values())
    return kept, {reason: counts[reason] for reason in ("kept", "wrong", "no_answer", "overflow", "search_failed")}


def end_at_answer(trajectory: Trajectory, tokenizer: Any) -> Trajectory:
    """An answered episode without what its policy wrote after the token that completes `</answer>`, and with an end.

    Collection does not stop at `</answer>`, so that the teacher's own end token follows; a teacher that was trained to
    be stopped there may write anything instead. An end token that it sampled right there stays. Else one is appended:
    a policy token whose log-prob is absent (None), counted in `counters`, on which only the cross-entropy is trained.

    Args:
        tokenizer: of the policy, with an end token.
    """
    turn = trajectory.turns[-1]
    ids = trajectory.response_ids[turn.start : turn.end]

    def is_answered(count: int) -> bool:
        return parse_action(tokenizer.decode(ids[:count], skip_special_tokens=False)).kind == "answer"

    length = bisect_left(range(len(ids)), True, key=is_answered)
    ended = length + 1 == len(ids) and not tokenizer.decode(ids[length:], skip_special_tokens=True)
    kept = turn.start + length + ended
    end = [] if ended else [tokenizer.eos_token_id]
    return replace(
        trajectory,
        response_ids=trajectory.response_ids[:kept] + end,
        response_mask=trajectory.response_mask[:kept] + [1] * len(end),
        log_probs=trajectory.log_probs and trajectory.log_probs[:kept] + [None] * len(end),
        turns=[*trajectory.turns[:-1], replace(turn, end=kept + len(end))],
        counters={**trajectory.counters, TAIL: turn.start + len(ids) - kept, APPENDED: len(end)},
    )


def tail_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many episodes lost a tail, its tokens, and how many were given an end token."""
    tails = [trajectory.counters[TAIL] for trajectory in trajectories]
    return {
        "episodes_with_tail": sum(tail > 0 for tail in tails),
        "dropped_tail_tokens": sum(tails),
        "appended_end_tokens": sum(trajectory.counters[APPENDED] for trajectory in trajectories),
    }


def _reason(trajectory: Trajectory, golds: Sequence[str]) -> str:
    if trajectory.status != "answered":
        return trajectory.status
    return "kept" if exact_match(trajectory.answer or "", golds) else "wrong"
