"""Cold-start losses by their published names. A new one is a function here and an entry in `DISTILLATION_LOSSES`.

Each takes logits at the policy positions only, and computes in chunks of rows whose log-probs are recomputed in the
backward pass, so that memory does not grow with tokens x vocabulary beyond the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from dgpo.algorithms.divergences import cross_entropy, forward_kl


def kd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    kl_ratio: float,
    denominator: torch.Tensor | float,
    chunk_size: int,
) -> torch.Tensor:
    """L = (1 - r) CE(y) + r KL(teacher || student), each summed over the full vocabulary per token (method, phase 1).

    Args:
        student_logits: [N, V] at the positions that predict a policy token.
        teacher_logits: [N, V'] the frozen teacher's; the padded tail of the longer vocabulary is cut.
        targets: [N] the tokens themselves.
        kl_ratio: r, the paper's "KL divergence ratio" (1.0).
        denominator: what the sum over tokens is divided by: the policy tokens of the whole batch.
        chunk_size: rows at once.

    Raises:
        ValueError: no teacher.
    """
    if teacher_logits is None:
        raise ValueError("the loss `kd` needs a teacher: set teacher.path, or choose distill.loss=seqkd")
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])

    def token_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        divergence = forward_kl(student[:, :vocab], teacher[:, :vocab])
        return ((1 - kl_ratio) * cross_entropy(student, target) + kl_ratio * divergence).sum()

    return _chunked_sum(token_loss, chunk_size, student_logits, teacher_logits, targets) / denominator


def seqkd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    kl_ratio: float,
    denominator: torch.Tensor | float,
    chunk_size: int,
) -> torch.Tensor:
    """Cross-entropy on the teacher's tokens (SeqKD / SFT, Kim & Rush 2016); needs no teacher logits, reads no ratio."""

    def token_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(student, target).sum()

    return _chunked_sum(token_loss, chunk_size, student_logits, targets) / denominator


DISTILLATION_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"kd": kd, "seqkd": seqkd}


def _chunked_sum(
    function: Callable[..., torch.Tensor], chunk_size: int, *rows: torch.Tensor
) -> torch.Tensor:
    """Sum of `function` over row chunks, recomputed in the backward pass; 0 with zero gradient for no rows."""
    total = rows[0].float().sum() * 0.0 if len(rows[0]) == 0 else rows[0].new_zeros((), dtype=torch.float32)
    for parts in zip(*(tensor.split(chunk_size) for tensor in rows), strict=True):
        if len(parts[0]):
            total = total + checkpoint(function, *parts, use_reentrant=False)
    return total
