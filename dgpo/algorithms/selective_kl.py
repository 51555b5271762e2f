"""The paper's teacher term: a penalty for leaving the teacher, on gated episodes (DGPO, arXiv 2508.20324).

Which episodes a gate chooses and where a form of the term enters the update are entries of `GATES` and `TEACHER_FORMS`:
a new entry is all that a new gate or form needs (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of the entries are checked in processes that have no use for torch
    import torch


@dataclass(frozen=True)
class Gate:
    """A choice of the episodes to which the teacher term applies.

    Attributes:
        episodes: how a sentence names them.
        choose: (correct [B], name -> [B] of every score of an episode, `coin` among them: a seeded number in [0, 1) of
            its own) -> [B], 1 or true where the term applies.
    """

    episodes: str
    choose: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def draw_as_many_as_failed(correct: torch.Tensor, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B] 1 on the episodes with the smallest coins, as many as there are wrong ones: chance in the gate's place."""
    chosen = correct.new_zeros(correct.shape)
    chosen[scores["coin"].argsort()[: int((correct < 0.5).sum())]] = 1
    return chosen


GATES = {
    # DGPO. Correctness, not the reward: a format reward must not switch the teacher off.
    "failed": Gate("the episodes that it got wrong", lambda correct, _: correct < 0.5),
    "all": Gate("every episode", lambda correct, _: correct.new_ones(correct.shape)),  # "w/o selective KL"
    "random": Gate("as many episodes as it got wrong, drawn by coin", draw_as_many_as_failed),  # a control
    "none": Gate("no episode", lambda correct, _: correct.new_zeros(correct.shape)),  # no teacher is loaded
}


def compute_gate(correct: torch.Tensor, mode: str, *, scores: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Where the teacher term applies.

    Args:
        correct: [B] 1 where the episode's answer is right.
        mode: a name of `GATES`.
        scores: name -> [B], what else is known of the episodes (`dgpo.agent.scoring.episode_scores`).

    Returns:
        [B], 1 or 0, of `correct`'s type.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in GATES:
        raise ValueError(f"unknown gate {mode!r}: expected one of {', '.join(GATES)}")
    return GATES[mode].choose(correct, scores or {}).to(correct.dtype)


def gated_token_share(gate: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """The share of a batch's policy tokens to which the teacher term applies; 0 where there are none.

    Args:
        gate: [B] 1 where the term applies.
        response_mask: [B, T] 1 on policy tokens.
    """
    tokens = response_mask.float().sum(-1)
    return (gate.float() * tokens).sum() / tokens.sum().clamp(min=1.0)


def subtract_teacher_kl(
    values: torch.Tensor,
    *,
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gate: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """r_t = score_t - beta * gate * I(y_t) * (log p_student(y_t) - log p_teacher(y_t)).

    The sampled-token (k1) estimate of KL(student || teacher), with the token mask I(y_t). Its full-vocabulary
    counterpart, as a loss, is in `dgpo.algorithms.chunked_head`. What it is subtracted from makes the difference
    between two forms of the term:

    - From the task's scores, before GAE (`reward`, the paper's): later tokens' terms add up in a token's advantage.
    - From the advantages, after their estimator and its whitening (`token`; as in on-policy distillation by policy
      gradient): the term acts on its own token only; no sum over later tokens, no critic between, less variance.

    Args:
        values: [B, T] the scores, on the last generated token, or the advantages.
        student_log_probs: [B, T] nats, of the sampled tokens under the policy that the batch was scored with.
        teacher_log_probs: [B, T] nats, the frozen teacher's, of the same tokens. May be anything where not gated.
        response_mask: [B, T] 1 on policy tokens.
        gate: [B] 1 where the term applies.
        kl_coef: beta beside scores (the paper: 0.001); a weight beside advantages of unit scale.

    Returns:
        [B, T]; equal to `values` wherever gate or mask is 0. Not reduced.

    Raises:
        ValueError: shapes that broadcasting would mix up in silence.
    """
    if gate.shape != values.shape[:1] or response_mask.shape != values.shape:
        raise ValueError(
            f"gate is {tuple(gate.shape)} and response_mask {tuple(response_mask.shape)}, but the values are "
            f"{tuple(values.shape)}: expected [B], [B, T] and [B, T]"
        )
    applies = (response_mask * gate[:, None]).bool()
    penalty = kl_coef * (student_log_probs - teacher_log_probs)
    return values - penalty.masked_fill(~applies, 0.0)


def unchanged(values: torch.Tensor, **_: Any) -> torch.Tensor:
    """What a form does that does not enter here."""
    return values


@dataclass(frozen=True)
class TeacherForm:
    """Where the teacher term enters an update.

    Attributes:
        default_coef: its weight, where `train.teacher_term.coef` names none.
        in_rewards: the rewards with the term, from the rewards and the arguments of `subtract_teacher_kl`.
        in_advantages: the same of the advantages.
        in_loss: the actor's loss compares both models' full distributions on gated episodes (`dgpo.rl.exact_loss`).
    """

    default_coef: float
    in_rewards: Callable[..., torch.Tensor] = unchanged
    in_advantages: Callable[..., torch.Tensor] = unchanged
    in_loss: bool = False


TEACHER_FORMS = {
    "reward": TeacherForm(0.001, in_rewards=subtract_teacher_kl),
    "token": TeacherForm(0.3, in_advantages=subtract_teacher_kl),
    "exact": TeacherForm(1.0, in_loss=True),
}
