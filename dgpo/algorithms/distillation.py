"""Cold-start losses by their published names: a new one is an entry in `DISTILLATION_LOSSES`.

Each gives per-token values from the logits of the positions that predict a policy token: no mask and no reduction
inside. `dgpo.algorithms.fused_linear` turns them into a scalar without holding all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # the names of the losses are checked in processes that have no use for torch
    import torch

# (student logits [n, V], teacher logits [n, V'] or None, targets [n]) -> values [n], in nats
TokenLoss: TypeAlias = "Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]"


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the losses; each loss reads its own.

    Attributes:
        kl_ratio: r in (1 - r) CE + r divergence, of every loss with a teacher (the paper: 1.0).
        skew: lambda of the skew KLs, the share of the first distribution in the mixture (DistiLLM: 0.1).
        jsd_beta: beta of the generalised JSD, the teacher's share.
        taid_t: the teacher's share of TAID's target at this step; `dgpo.algorithms.taid` moves it.
    """

    kl_ratio: float
    skew: float
    jsd_beta: float
    taid_t: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: expected a share between 0 and 1")


@dataclass(frozen=True)
class DistillationLoss:
    """A divergence of student and teacher, mixed with the cross-entropy; or the cross-entropy alone.

    Attributes:
        divergence: the name of a function of `dgpo.algorithms.divergences`, or None for the cross-entropy alone.
        settings: its arguments besides the logits -> the fields of `LossSettings` that they are.
    """

    divergence: str | None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_teacher(self) -> bool:
        return self.divergence is not None

    def token_loss(self, settings: LossSettings) -> TokenLoss:
        """(1 - r) CE(y) + r D(student, teacher) per token, as a function of logits and targets.

        CE is over the student's whole vocabulary, D over what the two share. The returned function raises ValueError
        when it needs a teacher's logits and gets None.
        """
        from dgpo.algorithms import divergences

        ratio = settings.kl_ratio
        numbers = {argument: getattr(settings, name) for argument, name in self.settings.items()}
        divergence = partial(getattr(divergences, self.divergence), **numbers) if self.divergence else None

        def values(
            student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, targets: torch.Tensor
        ) -> torch.Tensor:
            if divergence is None:
                return divergences.cross_entropy(student_logits, targets)
            if teacher_logits is None:
                raise ValueError("this loss needs a teacher: set teacher.path, or choose distill.loss=seqkd")
            loss = ratio * divergence(student_logits, teacher_logits)
            if ratio == 1:  # the paper's choice, which needs no second pass over the vocabulary
                return loss
            return loss + (1 - ratio) * divergences.cross_entropy(student_logits, targets)

        return values


DISTILLATION_LOSSES = {
    "kd": DistillationLoss("forward_kl"),  # Hinton et al. 2015, Sanh et al. 2019; DGPO's phase 1
    "seqkd": DistillationLoss(None),  # Kim & Rush 2016, on the teacher's episodes: the paper's SFT baseline
    # Ko et al. 2024; its student-generated episodes are the trainer's part
    "distillm": DistillationLoss("skew_forward_kl", {"skew": "skew"}),
    "taid": DistillationLoss("taid", {"t": "taid_t"}),
    "forward_kl": DistillationLoss("forward_kl"),
    "reverse_kl": DistillationLoss("reverse_kl"),
    "jsd": DistillationLoss("generalised_jsd", {"beta": "jsd_beta"}),
    "skew_kl": DistillationLoss("skew_forward_kl", {"skew": "skew"}),
    "skew_reverse_kl": DistillationLoss("skew_reverse_kl", {"skew": "skew"}),
}
