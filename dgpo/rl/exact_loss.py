"""The `exact` teacher term as a veRL loss function: PPO's loss plus the gated full-vocabulary reverse KL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from dgpo.algorithms.chunked_head import TeacherStates
from dgpo.platforms.token_engine import GATE_KEY, KL_KEY, TokenEngine


class ExactTeacherLoss:
    """Adds `coef * sum(gate * mask * KL(student || teacher)) / (policy tokens of the mini-batch)` to PPO's loss.

    The student's engine has computed the KL of every gated policy token, which `TeacherReader` gave it the teacher for.
    The denominator counts every policy token of the mini-batch, gated or not, as that of PPO's loss does: so the term
    fades as failures do, and micro-batching does not change it.

    Args:
        base_loss: PPO's loss, a partial with veRL's `config`.
        coef: weight of the term.
    """

    def __init__(self, base_loss: partial[Any], *, coef: float) -> None:
        self.base_loss = base_loss
        self.coef = coef

    def __call__(self, *, data: TensorDict, model_output: dict[str, torch.Tensor], dp_group: Any = None) -> Any:
        loss, metrics = self.base_loss(model_output=model_output, data=data, dp_group=dp_group)
        kl = no_padding_2_padding(model_output[KL_KEY], data)  # [B, T], 0 where the gate is shut
        mask = data.select("response_mask").to_padded_tensor()["response_mask"].to(bool)
        config = self.base_loss.keywords["config"]
        term = agg_loss(loss_mat=kl, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **config.global_batch_info)
        metrics["actor/teacher_loss"] = Metric(value=term.detach(), aggregation=AggregationType.SUM)
        return loss + self.coef * term, metrics


class TeacherReader:
    """Runs the frozen teacher on the gated episodes of a micro-batch: `TokenEngine.read_teacher`.

    Args:
        engine: the teacher's, in this process, with the student's vocabulary.
    """

    def __init__(self, engine: TokenEngine) -> None:
        self.engine = engine

    def __call__(self, data: TensorDict, predicts: torch.Tensor) -> TeacherStates:
        gate = data[GATE_KEY] > 0
        gated = gate.repeat_interleave(data["input_ids"].offsets().diff())
        # Every rank runs the forward pass, on one row of its own if it has no gated one: FSDP's collectives need all.
        rows = gate.nonzero()[:, 0].tolist() or [0]
        is_packed = tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True)
        hidden, head = self._states([data["input_ids"][row] for row in rows], is_packed=is_packed)
        kept = predicts[gated] if gate.any() else torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        return TeacherStates(at=gated[predicts], hidden=hidden[kept], head=head)

    @torch.no_grad()
    def _states(self, sequences: list[torch.Tensor], *, is_packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states of whole sequences, packed [sum of lengths, H], and the output matrix.

        The model reads them as it does the student's: in one row, where positions that start anew separate them, or in
        padded rows.
        """
        lengths = [len(sequence) for sequence in sequences]
        positions = [torch.arange(length, device=sequences[0].device) for length in lengths]
        if is_packed:
            inputs = {"input_ids": torch.cat(sequences)[None], "position_ids": torch.cat(positions)[None]}
            hidden = self.engine.module(**inputs, attention_mask=None, use_cache=False).logits[0]
        else:
            ones = [torch.ones_like(each) for each in positions]
            rows, mask = (pad_sequence(each, batch_first=True) for each in (sequences, ones))
            states = self.engine.module(input_ids=rows, attention_mask=mask, use_cache=False).logits
            hidden = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])
        head = self.engine.output_layer.weight
        if isinstance(head, DTensor):
            head = head.to(hidden.device).full_tensor()
        return hidden, head.to(hidden)
