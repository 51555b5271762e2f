"""Per-token divergences over the whole vocabulary, in nats. The direction is in the name.

p is the student's distribution, q the teacher's. Every function takes the student's logits [..., V] and the teacher's
[..., V'], lifts half precision to float32 (float64 stays), and returns [...] values, not reduced. The teacher is a
constant: no gradient reaches it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def mixture_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, teacher_weight: float, teacher_share: float
) -> torch.Tensor:
    """w KL(q || m) + (1 - w) KL(p || m), with the mixture m = s q + (1 - s) p.

    Every divergence below is a choice of w and s:

    | divergence           | w    | s          | value                          |
    |----------------------|------|------------|--------------------------------|
    | `forward_kl`         | 1    | 0          | KL(q || p)                     |
    | `reverse_kl`         | 0    | 1          | KL(p || q)                     |
    | `generalised_jsd`    | beta | beta       | the sum itself                 |
    | `skew_forward_kl`    | 1    | lambda     | KL(q || m)                     |
    | `skew_reverse_kl`    | 0    | 1 - lambda | KL(p || m)                     |

    Args:
        student_logits: [..., V], differentiable.
        teacher_logits: [..., V']. Of two vocabularies the shared part counts, see `align_vocabularies`.
        teacher_weight: w, between 0 and 1.
        teacher_share: s, between 0 and 1.
    """
    student_logits, teacher_logits = align_vocabularies(student_logits, teacher_logits)
    student, teacher = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    mixture = _log_mixture(student, teacher, teacher_share)
    if teacher_weight == 1:
        return _kl(teacher, mixture)
    if teacher_weight == 0:
        return _kl(student, mixture)
    return teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) = sum_v q_v (log q_v - log p_v): the student covers the teacher (Hinton et al. 2015)."""
    return mixture_divergence(student_logits, teacher_logits, teacher_weight=1.0, teacher_share=0.0)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v): the student picks modes (GKD, Agarwal et al. 2024)."""
    return mixture_divergence(student_logits, teacher_logits, teacher_weight=0.0, teacher_share=1.0)


def generalised_jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, beta: float) -> torch.Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1).

    beta is the *teacher's* share, as in GKD and TRL: 0 is `forward_kl` and 1 is `reverse_kl`, by definition. The
    formula itself goes to 0 at both ends; divided by beta (or by 1 - beta) it tends to those two. DistiLLM's
    `js_distance(lam)` counts the student's share: lam = 1 - beta.
    """
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    return mixture_divergence(student_logits, teacher_logits, teacher_weight=beta, teacher_share=beta)


def skew_forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, skew: float) -> torch.Tensor:
    """KL(q || lambda q + (1 - lambda) p): the student is mixed with `skew` = lambda of the teacher.

    DistiLLM's skew KL (arXiv 2402.03898, eq. 5), lambda = 0.1 there; 0 is `forward_kl`. Bounded by -log lambda.
    """
    return mixture_divergence(student_logits, teacher_logits, teacher_weight=1.0, teacher_share=skew)


def skew_reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, skew: float) -> torch.Tensor:
    """KL(p || lambda p + (1 - lambda) q): the teacher is mixed with `skew` = lambda of the student.

    DistiLLM's skew reverse KL (arXiv 2402.03898), lambda = 0.1 there; 0 is `reverse_kl`. Bounded by -log lambda.
    """
    return mixture_divergence(student_logits, teacher_logits, teacher_weight=0.0, teacher_share=1.0 - skew)


def taid(student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, t: float) -> torch.Tensor:
    """KL(q_t || p), with q_t = softmax((1 - t) z_p + t z_q) of the logits z, where z_p is held constant.

    TAID (Shing et al. 2025, arXiv 2501.16937): the target moves from the student itself (t = 0) to the teacher (t = 1,
    which is `forward_kl`).
    """
    student_logits, teacher_logits = align_vocabularies(student_logits, teacher_logits)
    target = (1.0 - t) * _lift(student_logits.detach()) + t * _lift(teacher_logits)
    return forward_kl(student_logits, target)


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target), for token ids `targets` [...]."""
    return -_log_probs(student_logits).gather(-1, targets[..., None])[..., 0]


def align_vocabularies(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both cut to the vocabulary they share: [..., min(V, V')].

    Models of one family pad the same tokenizer to different sizes: Qwen2.5 has 151,665 tokens, and output layers of
    151,936 (0.5B, 3B) or 152,064 rows (7B). What only one model has is padding, which neither is trained on: it is left
    out on both sides, and both distributions are normalised over what remains.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return _cut(student_logits, shared), _cut(teacher_logits, shared)


def _cut(logits: torch.Tensor, size: int) -> torch.Tensor:
    # Autograd copies the gradient of a slice, even of one that cuts nothing.
    return logits if logits.shape[-1] == size else logits[..., :size]


def _lift(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    # Clamped, so that a token that neither can produce adds 0, not NaN, to values and gradients.
    log_probs = _lift(logits).log_softmax(-1)
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def _log_mixture(student: torch.Tensor, teacher: torch.Tensor, teacher_share: float) -> torch.Tensor:
    if teacher_share == 0:
        return student
    if teacher_share == 1:
        return teacher
    return torch.logaddexp(teacher + math.log(teacher_share), student + math.log1p(-teacher_share))


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return F.kl_div(right, left, log_target=True, reduction="none").sum(-1)  # its arguments are the other way round
