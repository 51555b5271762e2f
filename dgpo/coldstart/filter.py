"""Phase 1a, second half: keep the teacher's correct episodes, and say why each of the others was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dgpo.agent.trajectory import Trajectory
from dgpo.metrics.exact_match import exact_match


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


def _reason(trajectory: Trajectory, golds: Sequence[str]) -> str:
    if trajectory.status != "answered":
        return trajectory.status
    return "kept" if exact_match(trajectory.answer or "", golds) else "wrong"
