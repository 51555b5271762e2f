"""Cold-start losses by their published names. A new one is a function here and an entry in `DISTILLATION_LOSSES`.

All have one signature and get the logits of the positions that predict a policy token, so no mask. Environment tokens
and padding never come in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dgpo.algorithms.divergences import cross_entropy, forward_kl
from dgpo.algorithms.reduce import chunked_mean


def kd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    kl_ratio: float,
    denominator: torch.Tensor | float,
    chunk_size: int,
) -> torch.Tensor:
    """L_KD = (1 - r) CE(y) + r KL(teacher || student) per token, over the full vocabulary (DGPO's phase 1).

    Args:
        student_logits: [N, V], differentiable.
        teacher_logits: [N, V'] the frozen teacher's at the same positions. A vocabulary that is padded further than the
            other's is cut to the shared part for the KL.
        targets: [N] the tokens themselves.
        kl_ratio: r, the paper's "KL divergence ratio" (1.0).
        denominator: of the mean: the number of policy tokens in the whole batch.
        chunk_size: rows whose full-vocabulary log-probs exist at once.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: no teacher.
    """
    if teacher_logits is None:
        raise ValueError("the loss `kd` needs a teacher: set teacher.path, or choose distill.loss=seqkd")
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])

    def token_loss(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = kl_ratio * forward_kl(student[:, :vocab], teacher[:, :vocab])
        if kl_ratio == 1:  # the paper's choice, which needs no second pass over the vocabulary
            return loss
        return loss + (1 - kl_ratio) * cross_entropy(student, target)

    return chunked_mean(
        token_loss, student_logits, teacher_logits.detach(), targets, denominator=denominator, chunk_size=chunk_size
    )


def seqkd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    kl_ratio: float,
    denominator: torch.Tensor | float,
    chunk_size: int,
) -> torch.Tensor:
    """CE(y), the cross-entropy on the teacher's tokens (SeqKD, Kim & Rush 2016; the paper's SFT baseline).

    Arguments and result as in `kd`; `teacher_logits` and `kl_ratio` are not read.
    """
    return chunked_mean(cross_entropy, student_logits, targets, denominator=denominator, chunk_size=chunk_size)


DISTILLATION_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"kd": kd, "seqkd": seqkd}
