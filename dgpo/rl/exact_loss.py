"""The `exact` teacher term as a veRL loss function: PPO's loss plus the gated full-vocabulary reverse KL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from dgpo.algorithms.exact_kl import exact_reverse_kl

KL_KEY = "teacher_reverse_kl"


class ExactTeacherLoss:
    """Adds `coef * sum(gate * mask * KL(student || teacher)) / (policy tokens of the mini-batch)` to PPO's loss.

    veRL calls it twice per micro-batch: with the student's logits, to reduce them to one KL value per token, and with
    the collected outputs, for the scalar loss. The denominator counts every policy token of the mini-batch, gated or
    not, as that of PPO's loss does: so the term fades as failures do, and micro-batching does not change it.

    Args:
        base_loss: PPO's loss, a partial with veRL's `config`.
        teacher: a frozen veRL engine, in this process, with the student's vocabulary.
        coef: weight of the term.
        chunk_tokens: tokens whose teacher logits exist at once.
    """

    def __init__(self, base_loss: partial[Any], *, teacher: Any, coef: float, chunk_tokens: int) -> None:
        self.base_loss = base_loss
        self.teacher = teacher
        self.coef = coef
        self.chunk_tokens = chunk_tokens

    def __call__(
        self,
        *,
        data: TensorDict,
        student_logits: torch.Tensor | None = None,
        model_output: dict[str, torch.Tensor] | None = None,
        dp_group: Any = None,
    ) -> Any:
        if student_logits is not None:
            return {KL_KEY: self.token_kl(student_logits[0], data)[None]}
        assert model_output is not None
        loss, metrics = self.base_loss(model_output=model_output, data=data, dp_group=dp_group)
        kl = no_padding_2_padding(model_output[KL_KEY], data)  # [B, T]
        padded = data.select("response_mask", "teacher_gate").to_padded_tensor()
        mask = padded["response_mask"].to(bool)
        gated = kl * padded["teacher_gate"][:, None]
        config = self.base_loss.keywords["config"]
        term = agg_loss(loss_mat=gated, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **config.global_batch_info)
        metrics["actor/teacher_loss"] = Metric(value=term.detach(), aggregation=AggregationType.SUM)
        return loss + self.coef * term, metrics

    def token_kl(self, student_logits: torch.Tensor, data: TensorDict) -> torch.Tensor:
        """KL at every packed position, 0 where it does not count: [nnz]."""
        offsets = data["input_ids"].offsets()
        prompt_lengths = data["prompts"].offsets().diff()
        gated = [row for row, gate in enumerate(data["teacher_gate"].tolist()) if gate > 0]
        rows, kept, sequences = [], [], []
        start = 0
        for row in gated:
            begin, end = int(offsets[row]), int(offsets[row + 1])
            mask = data["response_mask"][row].to(bool)
            # The logits that predict response token t stand one position before it.
            positions = torch.nonzero(mask)[:, 0] + int(prompt_lengths[row]) - 1
            rows.append(begin + positions)
            kept.append(start + positions)
            sequences.append(data["input_ids"].values()[begin:end])
            start += end - begin
        token_kl = student_logits.new_zeros(student_logits.shape[0], dtype=torch.float32)
        hidden, head = self._teacher_states(sequences, data)
        if not gated:
            return token_kl + 0.0 * student_logits.sum()  # keeps the graph the same on every rank
        index = torch.cat(rows)
        values = exact_reverse_kl(
            student_logits,
            rows=index,
            teacher_hidden=hidden[torch.cat(kept)],
            teacher_head=head,
            chunk_size=self.chunk_tokens,
        )
        return token_kl.index_put((index,), values)

    @torch.no_grad()
    def _teacher_states(self, sequences: list[torch.Tensor], data: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's final hidden states of whole sequences, packed [sum of lengths, H], and its output matrix.

        Every rank runs the forward pass, on one row of its own if it has no gated one: FSDP's collectives need all.
        """
        if not sequences:
            sequences = [data["input_ids"][0]]
        module = self.teacher.module
        lengths = [len(sequence) for sequence in sequences]
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        attention = (positions[None] < torch.tensor(lengths, device=input_ids.device)[:, None]).long()
        captured: list[torch.Tensor] = []
        handle = module.model.norm.register_forward_hook(lambda _module, _args, output: captured.append(output))
        try:
            module(input_ids=input_ids, attention_mask=attention, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        hidden = torch.cat([states[:length] for states, length in zip(captured[0], lengths, strict=True)])
        head = module.lm_head.weight
        if isinstance(head, DTensor):
            head = head.to(hidden.device).full_tensor()
        return hidden, head.to(hidden)
