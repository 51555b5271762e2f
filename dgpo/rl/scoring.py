"""The outcome reward of an episode and what else is counted about it. One flat dict of floats per episode."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo.metrics.exact_match import exact_match, f1_score
from dgpo.metrics.hits import answer_in_passages
from dgpo.trajectory import Trajectory


def episode_scores(trajectory: Trajectory, golds: Sequence[str]) -> dict[str, float]:
    """Scores one finished episode.

    Args:
        trajectory: the episode; its `answer` was parsed from policy tokens only.
        golds: the accepted answers.

    Returns:
        `em` (the reward of RL, 0 or 1), `f1`, `answered`, `num_searches`, `hit` (a gold answer stands in some retrieved
        passage), one 0/1 flag per status, and the counters of the episode (cuts, invalid actions, truncated turns).
    """
    answer = trajectory.answer
    documents = [document for record in trajectory.searches for document in record.documents]
    return {
        "em": float(answer is not None and exact_match(answer, golds)),
        "f1": f1_score(answer, golds) if answer is not None else 0.0,
        "answered": float(trajectory.status == "answered"),
        "num_searches": float(trajectory.num_searches),
        "hit": float(answer_in_passages(golds, documents)),
        "overflow": float(trajectory.status == "overflow"),
        "search_failed": float(trajectory.status == "search_failed"),
        **{name: float(count) for name, count in sorted(trajectory.counters.items())},
    }
