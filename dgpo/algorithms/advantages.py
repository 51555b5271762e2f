"""Advantages without a critic. GAE itself is veRL's; what is here knows which episodes take part in a statistic."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


def group_relative_advantages(
    token_level_rewards: torch.Tensor,
    *,
    response_mask: torch.Tensor,
    groups: Sequence[Hashable],
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """GRPO: A = (R - mean of its group) / (standard deviation of its group + epsilon), on every policy token.

    R is the sum of an episode's rewards, a teacher term in them included (DeepSeekMath, arXiv 2402.03300, sec. 4.1.2).
    An episode without policy tokens (its search failed) is in no mean and no deviation, and gets 0; so does an episode
    that is left alone in its group, which has nothing to be compared with. The deviation has N - 1 below it, as veRL's.

    Args:
        token_level_rewards: [B, T], 0 off the mask.
        response_mask: [B, T] 1 on policy tokens.
        groups: B names; the episodes of one question share one.
        epsilon: keeps groups of equal rewards finite: their advantages are 0.

    Returns:
        [B, T] float32, 0 off the mask.

    Raises:
        ValueError: `groups` has not one name per episode.
    """
    if len(groups) != len(token_level_rewards):
        raise ValueError(f"{len(groups)} group names for {len(token_level_rewards)} episodes: expected one each")
    returns = (token_level_rewards * response_mask).sum(-1).float()
    counted = response_mask.any(-1)
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        if counted[row]:
            members.setdefault(group, []).append(row)
    advantages = torch.zeros_like(returns)
    for rows in members.values():
        if len(rows) > 1:
            group_returns = returns[rows]
            advantages[rows] = (group_returns - group_returns.mean()) / (group_returns.std() + epsilon)
    return advantages[:, None] * response_mask
