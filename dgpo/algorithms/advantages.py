"""How rewards become advantages. `ALGORITHMS` lists the estimators: a new entry is all that a new one needs.

What is here knows which tokens and which episodes take part in a statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of the entries are checked in processes that have no use for torch
    import torch

EPSILON = 1e-6  # keeps groups of equal rewards finite: their advantages are 0
Estimate = tuple["torch.Tensor", "torch.Tensor"]  # advantages and returns, [B, T] each


def generalised_advantages(
    token_level_rewards: torch.Tensor, *, response_mask: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> Estimate:
    """GAE (arXiv 1506.02438), A_t = sum_k (gamma * lam)^k * delta_{t+k}, whitened over the batch's policy tokens.

    With delta_t = r_t + gamma * V_{t+1} - V_t, where t + 1 is the next policy token: what the environment wrote between
    two turns is passed over. Written to give veRL's numbers to the last bit.

    Args:
        token_level_rewards: [B, T].
        response_mask: [B, T] 1 on policy tokens.
        values: [B, T] the critic's.
        gamma, lam: discount, and the weight of longer estimates.

    Returns:
        Advantages with mean 0 and variance 1 on policy tokens, and the returns that the critic learns, [B, T] each.

    Raises:
        ValueError: fewer than two policy tokens, of which there is no variance.
    """
    num_tokens = response_mask.sum()
    if num_tokens < 2:
        raise ValueError(f"the batch has {int(num_tokens)} policy tokens: expected at least 2 to whiten advantages")
    advantages = values.new_zeros(values.shape)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        mask = response_mask[:, t]
        delta = token_level_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask + (1 - mask) * advantage
        next_value = values[:, t] * mask + (1 - mask) * next_value
        advantages[:, t] = advantage

    def mean(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens.masked_fill(response_mask == 0, 0.0) * response_mask).sum() / (num_tokens + 1e-8)

    centred = advantages - mean(advantages)
    variance = mean(centred**2) * (num_tokens / (num_tokens - 1))
    return centred * (variance + 1e-8).rsqrt(), advantages + values


def group_relative_advantages(
    token_level_rewards: torch.Tensor,
    *,
    response_mask: torch.Tensor,
    groups: Sequence[Hashable],
) -> torch.Tensor:
    """GRPO: A = (R - mean of its group) / (standard deviation of its group + 1e-6), on every policy token.

    R is the sum of an episode's rewards, a teacher term in them included (DeepSeekMath, arXiv 2402.03300, sec. 4.1.2).
    An episode without policy tokens (its search failed) is in no mean and no deviation, and gets 0; so does an episode
    that is left alone in its group, which has nothing to be compared with. The deviation has N - 1 below it, as veRL's.

    Args:
        token_level_rewards: [B, T], 0 off the mask.
        response_mask: [B, T] 1 on policy tokens.
        groups: B names; the episodes of one question share one.

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
    advantages = returns.new_zeros(returns.shape)
    for rows in members.values():
        if len(rows) > 1:
            group_returns = returns[rows]
            advantages[rows] = (group_returns - group_returns.mean()) / (group_returns.std() + EPSILON)
    return advantages[:, None] * response_mask


@dataclass(frozen=True)
class Algorithm:
    """An entry of `ALGORITHMS`.

    Attributes:
        title: how a sentence names it.
        estimate: (rewards [B, T], response_mask= [B, T], values= [B, T] or None, groups= B names, gamma=, lam=) ->
            advantages and returns.
        critic: it learns the `values`.
        compares_groups: it compares the episodes of one question, so that there must be several.
        task_reward: false where the teacher term alone is learnt from.
    """

    title: str
    estimate: Callable[..., Estimate]
    critic: bool = False
    compares_groups: bool = False
    task_reward: bool = True


def _ppo(rewards: torch.Tensor, *, groups: Sequence[Hashable], **inputs: Any) -> Estimate:
    return generalised_advantages(rewards, **inputs)


def _grpo(rewards: torch.Tensor, *, response_mask: torch.Tensor, groups: Sequence[Hashable], **_: Any) -> Estimate:
    advantages = group_relative_advantages(rewards, response_mask=response_mask, groups=groups)
    return advantages, advantages


def _gkd(rewards: torch.Tensor, **_: Any) -> Estimate:
    nothing = rewards.new_zeros(rewards.shape)
    return nothing, nothing


ALGORITHMS = {
    "ppo": Algorithm("PPO", _ppo, critic=True),
    "grpo": Algorithm("GRPO", _grpo, compares_groups=True),
    "gkd": Algorithm("on-policy distillation (GKD)", _gkd, task_reward=False),
}
