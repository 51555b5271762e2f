"""Per-token divergences over the whole vocabulary, in nats. The direction is in the name.

Logits come in as [..., V] of any float type and are lifted to float32; results are [...] float32, not reduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) = sum_v q_v (log q_v - log p_v), p the student, q the teacher (Hinton et al. 2015)."""
    return _kl(_log_probs(teacher_logits), _log_probs(student_logits))


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) = sum_v p_v (log p_v - log q_v), mode seeking (GKD, Agarwal et al. 2024)."""
    return _kl(_log_probs(student_logits), _log_probs(teacher_logits))


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target). `targets` is [...] of token ids."""
    flat = F.cross_entropy(student_logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL of two distributions given as log-probs; a token with zero probability on the left adds exactly 0."""
    return torch.where(left == -torch.inf, torch.zeros_like(left), left.exp() * (left - right)).sum(-1)
