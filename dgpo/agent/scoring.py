"""The outcome reward of an episode and what else is counted about it. One flat dict of floats per episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from dgpo.agent.plugins import Reward
from dgpo.agent.trajectory import Trajectory
from dgpo.errors import ConfigError
from dgpo.metrics.exact_match import exact_match, f1_score
from dgpo.metrics.hits import answer_in_passages
from dgpo.metrics.repetition import num_repeated_tokens


def episode_scores(trajectory: Trajectory, golds: Sequence[str]) -> dict[str, float]:
    """Scores one finished episode.

    Args:
        trajectory: the episode; its `answer` was parsed from policy tokens only.
        golds: the accepted answers.

    Returns:
        `em` (0 or 1: RL's reward unless `train.reward` names another, and the teacher's gate always), `f1`, `answered`,
        `num_searches`, `hit` (a gold answer stands in some retrieved passage), one 0/1 flag per status, counts of turns
        and tokens, and the counters of the episode (cuts, invalid actions, truncated turns).
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
        "num_turns": float(len(trajectory.turns)),
        "num_policy_tokens": float(sum(trajectory.response_mask)),
        "num_response_tokens": float(len(trajectory.response_ids)),
        "num_repeated_tokens": float(num_repeated_tokens(trajectory.response_ids, trajectory.response_mask)),
        **{name: float(count) for name, count in sorted(trajectory.counters.items())},
    }


def episode_reward(
    reward: Reward | None, trajectory: Trajectory, golds: Sequence[str], scores: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The reward of RL and its parts, to be logged: (total, {"reward_<part>": value}).

    Without a reward function it is exact match, which has no parts. A function may return one number, or named parts
    whose sum is the reward.

    Raises:
        ConfigError: it returned something else.
    """
    if reward is None:
        return scores["em"], {}
    value = reward(trajectory, golds, scores)
    parts = value if isinstance(value, Mapping) else {"total": value}
    if not parts or not all(isinstance(part, SupportsFloat) for part in parts.values()):
        raise ConfigError(
            f"train.reward returned {repr(value)[:100]}, expected a number, or a mapping of names to numbers "
            "(docs/extending.md)"
        )
    named = {f"reward_{name}": float(part) for name, part in parts.items()}
    return sum(named.values()), named
