"""The paper's reward: the task's score, and a penalty to the teacher on the gated episodes (DGPO, arXiv 2508.20324)."""

from __future__ import annotations

import torch

GATES = ("failed", "all", "none")


def compute_gate(correct: torch.Tensor, mode: str) -> torch.Tensor:
    """Where the teacher term applies.

    Args:
        correct: [B] 1 where the episode's answer is right. Correctness, not the score: a format reward must not
            switch the teacher off.
        mode: `failed` (DGPO), `all` (the "w/o selective KL" ablation), `none` (no teacher).

    Returns:
        [B], 1 or 0, of `correct`'s type.

    Raises:
        ValueError: unknown mode.
    """
    if mode == "failed":
        return (correct < 0.5).to(correct.dtype)
    if mode == "all":
        return torch.ones_like(correct)
    if mode == "none":
        return torch.zeros_like(correct)
    raise ValueError(f"unknown gate {mode!r}: expected one of {', '.join(GATES)}")


def selective_kl_rewards(
    token_level_scores: torch.Tensor,
    *,
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gate: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """r_t = score_t - beta * gate * I(y_t) * (log p_student(y_t) - log p_teacher(y_t)), before GAE.

    The sampled-token (k1) estimate of KL(student || teacher) inside the reward, with the token mask I(y_t). Its
    full-vocabulary counterpart, as a loss, is `dgpo.algorithms.exact_kl`.

    Args:
        token_level_scores: [B, T] the task's score, on the last generated token.
        student_log_probs: [B, T] nats, of the sampled tokens under the policy that the batch was scored with.
        teacher_log_probs: [B, T] nats, the frozen teacher's, of the same tokens. May be anything where not gated.
        response_mask: [B, T] 1 on policy tokens.
        gate: [B] 1 where the term applies.
        kl_coef: beta (the paper: 0.001).

    Returns:
        [B, T] rewards; equal to the scores wherever gate or mask is 0. Not reduced.

    Raises:
        ValueError: shapes that broadcasting would mix up in silence.
    """
    if gate.shape != token_level_scores.shape[:1] or response_mask.shape != token_level_scores.shape:
        raise ValueError(
            f"gate is {tuple(gate.shape)} and response_mask {tuple(response_mask.shape)}, but token_level_scores is "
            f"{tuple(token_level_scores.shape)}: expected [B], [B, T] and [B, T]"
        )
    applies = (response_mask * gate[:, None]).bool()
    penalty = kl_coef * (student_log_probs - teacher_log_probs)
    return token_level_scores - torch.where(applies, penalty, torch.zeros_like(penalty))


def selective_kl_advantages(
    advantages: torch.Tensor,
    *,
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gate: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """A_t - coef * gate * I(y_t) * (log p_student(y_t) - log p_teacher(y_t)): the term acts on its own token only.

    The same sampled estimate as in `selective_kl_rewards`, but added after the advantage estimator (and its whitening),
    as in on-policy distillation by policy gradient: no sum over later tokens, no critic between, less variance.

    Args:
        advantages: [B, T].
        kl_coef: weight beside advantages of unit scale.

    The other arguments, the result and the errors are those of `selective_kl_rewards`.
    """
    return selective_kl_rewards(
        advantages,
        student_log_probs=student_log_probs,
        teacher_log_probs=teacher_log_probs,
        response_mask=response_mask,
        gate=gate,
        kl_coef=kl_coef,
    )
