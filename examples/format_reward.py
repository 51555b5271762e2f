"""A reward of your own: exact match, a little for a well-formed episode, and a price per search.

python -m dgpo train train.reward=examples.format_reward:reward ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dgpo.agent.trajectory import Trajectory

FORMAT_BONUS = 0.1  # well below 1: a wrong answer in good form must never beat a right one
SEARCH_COST = 0.01  # per search beyond the first


def reward(trajectory: Trajectory, golds: Sequence[str], scores: Mapping[str, float]) -> dict[str, float]:
    """Named parts, whose sum is the reward; each is logged as `episode/reward_<name>`.

    Args:
        trajectory: the finished episode: its turns, searches, answer and status.
        golds: the accepted answers.
        scores: counted anyway (`dgpo.agent.scoring.episode_scores`): em, f1, num_searches, num_invalid_actions, ..
    """
    well_formed = trajectory.answer is not None and scores["num_invalid_actions"] == 0
    return {
        "em": scores["em"],
        "format": FORMAT_BONUS * well_formed,
        "searches": -SEARCH_COST * max(0, trajectory.num_searches - 1),
    }
