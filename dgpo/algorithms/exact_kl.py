"""Full-vocabulary KL(student || teacher) on chosen rows, in chunks, differentiable in the student's logits only."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _ChunkedReverseKL(torch.autograd.Function):
    """Recomputes the teacher's logits chunk by chunk in forward and in backward.

    Autograd over the same chunks would make a whole [tokens, vocabulary] gradient per chunk; here the backward pass
    writes each chunk's rows into one.
    """

    @staticmethod
    def forward(ctx, student_logits, rows, teacher_hidden, teacher_head, chunk_size):  # type: ignore[no-untyped-def]
        kl = torch.empty(len(rows), dtype=torch.float32, device=student_logits.device)
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            student, teacher = _chunk_log_probs(student_logits, rows[part], teacher_hidden[part], teacher_head)
            kl[part] = (student.exp() * (student - teacher)).sum(-1)
        ctx.save_for_backward(student_logits, rows, teacher_hidden, teacher_head, kl)
        ctx.chunk_size = chunk_size
        return kl

    @staticmethod
    def backward(ctx, grad_kl):  # type: ignore[no-untyped-def]
        student_logits, rows, teacher_hidden, teacher_head, kl = ctx.saved_tensors
        grad = torch.zeros_like(student_logits)
        vocab = min(student_logits.shape[-1], teacher_head.shape[0])
        for start in range(0, len(rows), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            student, teacher = _chunk_log_probs(student_logits, rows[part], teacher_hidden[part], teacher_head)
            # d KL / d logit_v = p_v (log p_v - log q_v - KL)
            gradient = student.exp() * (student - teacher - kl[part, None]) * grad_kl[part, None]
            grad[rows[part], :vocab] = gradient.to(grad.dtype)
        return grad, None, None, None, None


def _chunk_log_probs(
    student_logits: torch.Tensor, rows: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probs of both models over the vocabulary they share; padded tails of one of them are cut."""
    vocab = min(student_logits.shape[-1], teacher_head.shape[0])
    student = student_logits[rows, :vocab].float().log_softmax(-1)
    teacher = F.linear(teacher_hidden, teacher_head[:vocab]).float().log_softmax(-1)
    return student, teacher


def exact_reverse_kl(
    student_logits: torch.Tensor,
    *,
    rows: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Per-token KL(student || teacher) = sum_v p_v (log p_v - log q_v), in nats, over the whole vocabulary.

    The exact counterpart of the sampled k1 estimate in the paper's reward (DGPO, arXiv 2508.20324, section 3.2). Beside
    the student's logits, which exist anyway, and their gradient, at most `chunk_size` rows of vocabulary size exist.

    Args:
        student_logits: [N, V], differentiable.
        rows: [M] indices into N of the tokens that count, each at most once. M may be 0.
        teacher_hidden: [M, H] the frozen teacher's last hidden states at the same tokens (after its final norm).
        teacher_head: [V', H] the teacher's output matrix; a vocabulary padded further than the other's is cut.
        chunk_size: rows whose teacher logits exist at once.

    Returns:
        [M] float32, one value per row; no reduction.

    Raises:
        ValueError: `rows` and `teacher_hidden` disagree in length.
    """
    if len(rows) != len(teacher_hidden):
        raise ValueError(f"{len(rows)} rows but {len(teacher_hidden)} teacher states: they must be the same tokens")
    return _ChunkedReverseKL.apply(student_logits, rows, teacher_hidden.detach(), teacher_head.detach(), chunk_size)
