"""Per-token divergences over the whole vocabulary, in nats. The direction is in the name.

Logits come in as [..., V] of any float type and are lifted to float32; results are [...] float32, not reduced. p is the
student's distribution, q the teacher's.
"""

from __future__ import annotations

import torch


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) = sum_v q_v (log q_v - log p_v): the student covers the teacher (Hinton et al. 2015)."""
    return _kl(_log_probs(teacher_logits), _log_probs(student_logits))


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v): the student picks modes (GKD, Agarwal et al. 2024)."""
    return _kl(_log_probs(student_logits), _log_probs(teacher_logits))


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target), for token ids `targets` [...]."""
    return -_log_probs(student_logits).gather(-1, targets[..., None])[..., 0]


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL of two distributions given as log-probs; what has no probability on the left adds exactly 0."""
    return (left.exp() * (left - right).masked_fill(left == -torch.inf, 0.0)).sum(-1)
