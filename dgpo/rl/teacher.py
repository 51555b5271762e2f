"""Whom the teacher scores, and what the forms of its term read of that.

| form | scored | the term acts in |
|---|---|---|
| `reward` | gated episodes, and a few for monitoring | the rewards, before advantages are estimated |
| `token` | gated episodes, and a few for monitoring | the advantages |
| `exact` | a few for monitoring | the actor's loss (`dgpo.rl.exact_loss`), which runs the teacher on gated episodes |

The forms and gates themselves are in `dgpo.algorithms.selective_kl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested

from dgpo.agent.seeds import derive_seed
from dgpo.algorithms.selective_kl import TEACHER_FORMS, TeacherForm, compute_gate, gated_token_share
from dgpo.rl.metrics import choose_monitored, teacher_kl_metrics
from dgpo.rl.settings import TeacherSettings

Scores = Sequence[Mapping[str, float]]  # one per episode, from `dgpo.agent.scoring`


class Teacher:
    """The frozen teacher, or none.

    Args:
        settings: what it is asked for.
        num_ranks: data-parallel ranks, by which the number of scored episodes must divide.
        temperature: at which the student samples, and its log-probs are computed.
    """

    def __init__(self, settings: TeacherSettings, *, num_ranks: int, temperature: float) -> None:
        self.settings = settings
        self.num_ranks = num_ranks
        self.temperature = temperature
        self.is_there = settings.path is not None
        self.form = TEACHER_FORMS[settings.form] if self.is_there else TeacherForm(default_coef=0.0)

    def gate(self, keys: Sequence[str], scores: Scores) -> torch.Tensor:
        """[B] 1 where the term applies to the episodes of these keys."""
        names = sorted(set().union(*scores))
        columns = {name: torch.tensor([float(score.get(name, 0.0)) for score in scores]) for name in names}
        columns["coin"] = torch.tensor([derive_seed("gate", self.settings.seed, key) / 2**31 for key in keys])
        return compute_gate(columns["em"], self.settings.gate, scores=columns)

    def choose(self, keys: Sequence[str], scores: Scores, metrics: dict[str, Any]) -> list[str]:
        """The episodes that it scores: those whose log-probs the form reads, and a few for monitoring."""
        correct = torch.tensor([score["em"] for score in scores])
        gate = self.gate(keys, scores).bool()
        scored = torch.zeros_like(gate) if self.form.in_loss else gate
        monitored = choose_monitored(
            correct, already=scored, num_monitored=self.settings.num_monitored, multiple=self.num_ranks
        )
        chosen = [keys[index] for index in torch.nonzero(scored | monitored)[:, 0].tolist()]
        metrics["teacher/num_scored"] = len(chosen)
        metrics["teacher/num_monitored"] = int(monitored.sum())
        return chosen

    def score(self, chosen: KVBatchMeta, workers: Any) -> dict[str, torch.Tensor]:
        """Log-probs of the chosen episodes' sampled tokens: episode -> [T] in nats.

        Args:
            workers: veRL's group of `dgpo.rl.worker.TeacherGuidedWorker`.
        """
        chosen.extra_info.update(calculate_entropy=False, compute_loss=False, temperature=self.temperature)
        workers.compute_teacher_log_prob(chosen)
        data = tq.kv_batch_get(
            keys=chosen.keys, partition_id=chosen.partition_id, select_fields=["log_probs", "response_mask"]
        )
        rows = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
        return dict(zip(chosen.keys, rows, strict=True))

    def send_gate(self, batch: KVBatchMeta, scores: Scores) -> None:
        """Puts the gate where the actor's loss reads it."""
        fields = TensorDict({"teacher_gate": self.gate(batch.keys, scores).float()}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def inputs(
        self,
        keys: Sequence[str],
        scores: Scores,
        log_probs: Mapping[str, torch.Tensor],
        *,
        student_log_probs: torch.Tensor,
        response_mask: torch.Tensor,
        metrics: dict[str, Any],
    ) -> dict[str, Any]:
        """What the sampled forms of the term read (arguments of `subtract_teacher_kl`). Logs the measured KL.

        Args:
            log_probs: what `score` returned.
            student_log_probs: [B, T] nats.
            response_mask: [B, T].
        """
        gate = self.gate(keys, scores)
        metrics["teacher/gate_fraction"] = gate.float().mean().item()
        metrics["teacher/gate_token_fraction"] = gated_token_share(gate, response_mask).item()
        teacher = student_log_probs.clone()  # the difference is 0 where the teacher was not asked
        for row, key in enumerate(keys):
            if key in log_probs:
                teacher[row, : len(log_probs[key])] = log_probs[key]
        metrics.update(
            teacher_kl_metrics(
                student_log_probs - teacher,
                response_mask=response_mask,
                correct=torch.tensor([score["em"] for score in scores]),
                scored=torch.tensor([key in log_probs for key in keys]),
            )
        )
        return {
            "student_log_probs": student_log_probs,
            "teacher_log_probs": teacher,
            "response_mask": response_mask,
            "gate": gate,
            "kl_coef": self.settings.coef,
        }
