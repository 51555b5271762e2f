"""veRL's FSDP engine with an output layer that computes what RL reads of policy tokens, and no logits of all tokens.

veRL 0.9.1 makes the logits of every position of a micro-batch, prompt and passages included, and several tensors of
their size from them. Here the output layer is handed the positions that predict a policy token and answers with
`dgpo.algorithms.chunked_head.token_terms` of these: the same for the policy, the initial policy and the teacher, on
GPUs and CPUs. Log-probs and entropies of other tokens are 0: nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import ulysses_pad_and_slice_inputs
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from dgpo.algorithms.chunked_head import ENTROPY, LOG_PROB, TEACHER_KL, TeacherStates, token_terms
from dgpo.platforms import CHUNK

KL_KEY = "teacher_reverse_kl"  # key of a micro-batch's outputs, where a teacher is read
GATE_KEY = "teacher_gate"  # key of a micro-batch: [B], 1 where the exact teacher term applies


@dataclass(frozen=True)
class Asked:
    """What a forward pass is to compute.

    Attributes:
        places: [N] positions in the flattened input whose next token is the policy's.
        targets: [N] ids of these tokens.
    """

    places: torch.Tensor
    targets: torch.Tensor
    temperature: float
    teacher: TeacherStates | None


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor="nvidia")
class TokenEngine(FSDPEngineWithLMHead):
    """A language model whose `logits` are `token_terms` [.., 3] while it is asked for some, and else its last states.

    Attributes:
        read_teacher: (micro-batch with a gate, [nnz] bool: packed positions that predict a policy token) -> the teacher
            there, for the loss; None without an exact teacher term.
    """

    read_teacher: Callable[[TensorDict, torch.Tensor], TeacherStates] | None = None
    asked: Asked | None = None

    def _build_module(self) -> Any:
        module = super()._build_module()
        self.output_layer = module.get_output_embeddings()
        if self.output_layer.bias is not None or getattr(module.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{self.model_config.local_path}: RL reads hidden states through an output matrix, and knows neither a "
                "bias of it nor a cap of its logits: choose a model without"
            )
        self.output_layer.forward = self._output
        return module

    def _output(self, hidden: torch.Tensor) -> torch.Tensor:
        asked = self.asked
        if asked is None:
            return hidden
        at = asked.places // hidden.shape[1], asked.places % hidden.shape[1]
        terms = token_terms(
            hidden[at],
            head=self.output_layer.weight,
            targets=asked.targets,
            temperature=asked.temperature,
            chunk_size=self.model_config.fused_kernel_options[CHUNK],
            teacher=asked.teacher,
        )
        return terms.new_zeros(*hidden.shape[:2], terms.shape[1]).index_put(at, terms)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        predicts = predicts_policy(micro_batch)
        is_packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
        offsets = micro_batch["input_ids"].offsets()
        places = None if is_packed else padded_places(offsets, inputs["input_ids"].shape[1])
        teacher = None
        if self.read_teacher is not None and _has_gate(micro_batch):
            teacher = self.read_teacher(micro_batch, predicts)
        output_args["places"] = places
        if self.use_ulysses_sp:
            size = self.ulysses_sequence_parallel_size
            predicts = ulysses_pad_and_slice_inputs(predicts[None].int(), None, size)[0][0].bool()
        self.asked = Asked(
            places=predicts.nonzero()[:, 0] if places is None else places[predicts],
            targets=output_args["input_ids_rmpad_rolled"][predicts],
            temperature=float(micro_batch["temperature"]),
            teacher=teacher,
        )
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        self.asked = None
        terms = output.logits.flatten(0, -2)
        if (places := output_args["places"]) is None:
            terms = self._gather_and_unpad_packed(terms, output_args["pad_size"])
        else:
            terms = terms[places]
        columns = {"log_probs": LOG_PROB}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            columns["entropy"] = ENTROPY
        if self.read_teacher is not None and _has_gate(micro_batch):
            columns[KL_KEY] = TEACHER_KL
        offsets = micro_batch["input_ids"].offsets()
        return {
            name: torch.nested.nested_tensor_from_jagged(terms[:, column].contiguous(), offsets)
            for name, column in columns.items()
        }


def _has_gate(micro_batch: TensorDict) -> bool:
    return micro_batch.get(GATE_KEY, None) is not None


def padded_places(offsets: torch.Tensor, width: int) -> torch.Tensor:
    """[nnz] where each packed token stands in padded rows of `width` tokens, flattened."""
    lengths = offsets.diff()
    starts = torch.arange(len(lengths), device=offsets.device) * width - offsets[:-1]
    return torch.arange(int(offsets[-1]), device=offsets.device) + starts.repeat_interleave(lengths)


def predicts_policy(micro_batch: TensorDict) -> torch.Tensor:
    """[nnz] whether the token behind each packed one is the policy's, whose log-prob is read from the states here."""
    prompts = micro_batch["prompts"].offsets().diff().tolist()
    rows = zip(prompts, micro_batch["response_mask"].unbind(), strict=True)
    parts = [torch.cat([mask.new_zeros(length), mask]) for length, mask in rows]
    return torch.cat(parts).roll(-1).bool()
