"""What a training step reports about its episodes and its teacher. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgpo.algorithms.reduce import masked_mean

SHARES = {  # name -> (part, whole), counted over all episodes of the step
    "repeated_token_share": ("num_repeated_tokens", "num_policy_tokens"),
    "truncated_turn_share": ("num_truncated_turns", "num_turns"),
    "invalid_action_rate": ("num_invalid_actions", "num_turns"),
}


def episode_metrics(scores: Sequence[dict[str, float]], *, max_response_tokens: int) -> dict[str, float]:
    """What `episode/` holds of a step: means of every score, and the shares that tell of a collapse.

    Args:
        scores: of each episode, from `dgpo.agent.scoring`. A name that an episode lacks counts as 0 in it.
        max_response_tokens: the limit of which `response_fill` is the mean share that the responses fill.
    """
    names = sorted(set().union(*scores))
    means = {name: sum(score.get(name, 0.0) for score in scores) / len(scores) for name in names}
    shares = {
        name: means.get(part, 0.0) / means[whole] for name, (part, whole) in SHARES.items() if means.get(whole, 0.0) > 0
    }
    fill = means.get("num_response_tokens", 0.0) / max_response_tokens
    return {f"episode/{name}": value for name, value in {**means, **shares, "response_fill": fill}.items()}


def sampled_kl(log_ratio: torch.Tensor, response_mask: torch.Tensor) -> float:
    """Mean k1 estimate of KL(student || other) in nats per policy token.

    Args:
        log_ratio: [B, T] log p_student - log p_other of the tokens that the student sampled.
        response_mask: [B, T] 1 on policy tokens.
    """
    return masked_mean(log_ratio, response_mask).item()


def choose_monitored(
    correct: torch.Tensor, *, already: torch.Tensor, num_monitored: int, multiple: int
) -> torch.Tensor:
    """Episodes that the teacher scores for monitoring only: the first correct and the first failed ones of the batch.

    Args:
        correct: [B] 1 where the answer was right.
        already: [B] bool, episodes that the teacher scores anyway.
        num_monitored: how many of each kind to add.
        multiple: the total is filled up to a multiple of this many ranks, with any episode, where it would not divide.

    Returns:
        [B] bool, disjoint from `already`.
    """
    chosen = torch.zeros(len(correct), dtype=torch.bool)
    for kind in (correct > 0.5, correct <= 0.5):
        chosen[torch.nonzero(kind & ~already)[:num_monitored, 0]] = True
    missing = -int((already | chosen).sum()) % multiple
    chosen[torch.nonzero(~already & ~chosen)[:missing, 0]] = True
    return chosen


def teacher_kl_metrics(
    log_ratio: torch.Tensor, *, response_mask: torch.Tensor, correct: torch.Tensor, scored: torch.Tensor
) -> dict[str, float]:
    """Mean k1 estimate of KL(student || teacher) per policy token (nats): failed, correct, and all scored episodes.

    Apart, because the mean over all rows mixes a changing share of the two. A group without scored tokens is left out.

    Args:
        log_ratio: [B, T] log p_student - log p_teacher of the sampled tokens.
        response_mask: [B, T] 1 on policy tokens.
        correct: [B] 1 where the answer was right.
        scored: [B] bool, where `log_ratio` was measured.
    """
    groups = {"failed": scored & (correct < 0.5), "correct": scored & (correct > 0.5), "all": scored}
    metrics = {}
    for name, rows in groups.items():
        mask = response_mask * rows[:, None]
        if mask.sum() > 0:
            metrics[f"teacher/kl_{name}"] = masked_mean(log_ratio, mask).item()
    return metrics


def log_prob_disagreement(
    rollout: torch.Tensor, trainer: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, float]:
    """Largest and mean |difference| in nats between what rollout engine and trainer say of the same sampled tokens.

    Beyond rounding it means that the two do not see the same tokens or weights. All arguments are [B, T].
    """
    differences = (rollout - trainer).abs() * response_mask
    mean = masked_mean(differences, response_mask)
    return {"rollout/log_prob_diff_max": differences.max().item(), "rollout/log_prob_diff_mean": mean.item()}
