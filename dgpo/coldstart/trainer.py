"""Supervised training on episodes, on policy tokens only: Hugging Face's `Trainer` around the fused loss.

It serves the cold start and, with `seqkd` on ideal episodes, the tiny teacher's own training. Optimiser, scheduler,
accumulation, mixed precision, DDP, FSDP2 and checkpoints are Hugging Face's; the loss is `dgpo.algorithms`'. (veRL's
supervised engine would bring the same, but no place for a teacher beside the student.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from dgpo.algorithms.distillation import DISTILLATION_LOSSES, LossSettings, TokenLoss
from dgpo.algorithms.fused_linear import fused_linear_loss
from dgpo.algorithms.taid import TaidSchedule, TaidState, initial_state, update_state
from dgpo.coldstart.examples import IGNORE, StepBatches, TrainingExample, collate
from dgpo.coldstart.metrics import StepClock
from dgpo.coldstart.student_episodes import StudentEpisodes
from dgpo.config.schema import DistillConfig
from dgpo.errors import DgpoError
from dgpo.files import atomic_write_text
from dgpo.runs.checkpoints import seal
from dgpo.runs.stopping import stop_requested

STATE = "distill.json"
CROSS_ENTROPY = DISTILLATION_LOSSES["seqkd"].token_loss(  # which reads none of its settings
    LossSettings(kl_ratio=0.0, skew=0.0, jsd_beta=0.0, taid_t=0.0)
)


class LossInHead:
    """Makes a causal language model's forward return losses in place of logits, through its output layer.

    The loss is then made inside the model's own forward, where FSDP has gathered the output matrix, autocast is on, and
    DDP sees every parameter, whether or not that matrix is tied to the embeddings.
    """

    def __init__(self, model: PreTrainedModel, make_losses: Any):
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{model.config.model_type} caps its logits after the output layer, which the fused loss does not do: "
                "choose a model without final_logit_softcapping"
            )
        self.head, self.make_losses = model.get_output_embeddings(), make_losses
        self.head.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.make_losses(hidden, self.head.weight, getattr(self.head, "bias", None))

    def remove(self) -> None:
        """Gives the model its logits back."""
        del self.head.forward


# Several ranks on CPUs read their checkpoint to "cpu:0", a name under which torch saves and does not load.
torch.serialization.register_package(
    11, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class DistillationTrainer(Trainer):
    """Trainer whose loss is one of `dgpo.algorithms.distillation`, with a frozen teacher beside the model.

    The teacher is whole on every rank, in `hardware.dtype`: 8 billion parameters take 16 GB.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        examples: Sequence[TrainingExample],
        held_out: Sequence[TrainingExample],
        pad_token_id: int,
        settings: DistillConfig,
        num_steps: int,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
        student_episodes: StudentEpisodes | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(examples),
            eval_dataset=sorted(held_out, key=len) or None,
            callbacks=callbacks,
        )
        # The loss below already divides by the number of trained tokens of the whole (accumulated) batch.
        self.model_accepts_loss_kwargs = True
        self.pad_token_id, self.settings, self.num_steps = pad_token_id, settings, num_steps
        self.teacher: Any = None if teacher is None else teacher.to(args.device).eval().requires_grad_(False)
        self.student_episodes = student_episodes
        self.taid = TaidSchedule(num_steps=num_steps, **asdict(settings.taid))
        self.taid_state = initial_state(self.taid)
        self.clock = StepClock()
        self.loss_in_head = LossInHead(model, self._losses)
        self.stopping = False  # asked to, on any rank; the step in progress is finished and saved
        self._batch: dict[str, Any] = {}
        self._step_loss = torch.zeros((), device=args.device)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args and not self.is_fsdp_enabled:
            _enable_fsdp_on_cpu(self)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.set_state_dict_type("FULL_STATE_DICT")
            if self.args.bf16:  # Accelerate would reduce gradients in bfloat16 too
                plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)

    def get_train_dataloader(self) -> DataLoader:
        """Lists of examples, one per micro-batch of this rank, over all steps of the training."""
        batches = StepBatches(
            [len(example) for example in self.train_dataset],
            batch_size=self.settings.batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            num_steps=self.num_steps,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=list)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[TrainingExample]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The micro-batches of one step, and the number of trained tokens in them over all ranks."""
        self.clock.start()
        self._step_loss.zero_()
        parts = [next(epoch_iterator) for _ in range(num_batches)]
        if self.student_episodes is not None:
            parts = self._choose_episodes(parts, self.student_episodes)
        batches = [collate(part, pad_token_id=self.pad_token_id) for part in parts]
        self._num_tokens = sum(len(example) for part in parts for example in part)
        return batches, self._get_num_items_in_batch(batches, device)

    def _choose_episodes(
        self, parts: list[list[TrainingExample]], student_episodes: StudentEpisodes
    ) -> list[list[TrainingExample]]:
        """The teacher's episodes as they came, or the student's in their place, in as many micro-batches."""
        chosen = student_episodes.choose(
            [example for part in parts for example in part],
            step=self.state.global_step + 1,
            num_steps=self.num_steps,
            save_weights=self._save_weights,
            on_all_ranks=lambda holds: self._total(holds) == self.args.world_size,
        )
        size = self.args.per_device_train_batch_size
        return [chosen[i * size : (i + 1) * size] for i in range(len(parts))]

    def _save_weights(self, folder: Path) -> None:
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()

    def _total(self, count: float) -> float:
        return float(self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), reduction="sum"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of a micro-batch: its sum over policy tokens, divided by those of the whole batch on all ranks."""
        denominator = (inputs["labels"][:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        losses = self._forward(model, inputs, [self._token_loss(self.taid_state.t)], denominator)
        # DDP and FSDP average the gradients of their ranks, but the denominator counts the tokens of all of them.
        loss = losses[0] * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], losses: list[TokenLoss], denominator: Any
    ) -> torch.Tensor:
        """The values of `losses` on a micro-batch, [len(losses)]."""
        labels = inputs["labels"][:, 1:]
        kept = labels != IGNORE
        self._batch = {
            "kept": kept,
            "targets": labels[kept],
            "appended": inputs["appended"][:, 1:][kept],
            "losses": losses,
            "denominator": denominator,
        }
        if self.teacher is not None:
            with torch.no_grad():
                states = self.teacher.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            self._batch["teacher_hidden"] = states[:, :-1][kept]
        return model(input_ids=inputs["input_ids"], use_cache=False).logits

    def _losses(self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The model's output layer: [B, T, H] -> the states that predict a trained token, [N, H] -> losses.

        Nobody sampled an end token that was appended, and the teacher's distribution there is of another text: its loss
        is the cross-entropy.
        """
        batch = self._batch
        states = hidden[:, :-1][batch["kept"]]
        teacher_head = None if self.teacher is None else self.teacher.get_output_embeddings().weight

        def total(token_loss: TokenLoss, rows: Any, *, with_teacher: bool) -> torch.Tensor:
            return fused_linear_loss(
                token_loss,
                student_hidden=states[rows],
                student_head=head,
                student_bias=bias,
                targets=batch["targets"][rows],
                denominator=batch["denominator"],
                teacher_hidden=batch["teacher_hidden"][rows] if with_teacher else None,
                teacher_head=teacher_head if with_teacher else None,
                chunk_size=self.settings.chunk_tokens,
            )

        appended = batch["appended"]
        sampled = ~appended if appended.any() else slice(None)
        values = [total(loss, sampled, with_teacher=self.teacher is not None) for loss in batch["losses"]]
        if appended.any():
            rest = total(CROSS_ENTROPY, appended, with_teacher=False)
            values = [value + rest for value in values]
        return torch.stack(values)

    def _token_loss(self, taid_t: float) -> TokenLoss:
        settings = self.settings
        return DISTILLATION_LOSSES[settings.loss].token_loss(
            LossSettings(kl_ratio=settings.kl_ratio, skew=settings.skew, jsd_beta=settings.jsd_beta, taid_t=taid_t)
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Between the backward passes of a step and its update."""
        grad_norm = super()._clip_grad_norm(model)
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        asked = stop_requested(Path(self.args.output_dir).parent)  # ranks may see the file at different steps
        sums = torch.stack([self._step_loss, *self._step_loss.new_tensor([float(self._num_tokens), float(asked)])])
        loss, num_tokens, num_asked = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss /= self.args.world_size
        self.stopping = num_asked > 0
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise DgpoError(
                f"step {self.state.global_step + 1}: loss {loss:.4g}, gradient norm {float(grad_norm):.4g}, so the run "
                "stopped before this update; the last checkpoint is kept. Look at the loss before it in metrics.jsonl, "
                "lower distill.learning_rate or raise distill.warmup_ratio, and start again"
            )
        if self.settings.loss == "taid":
            self.taid_state = update_state(self.taid_state, loss, step=self.state.global_step, schedule=self.taid)
        self.clock.stop(num_tokens)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the training loss what else is known of the steps since the last log."""
        if "loss" in logs:
            logs |= self.clock.read()
            if self.settings.loss == "taid":
                logs["taid_t"] = self.taid_state.t
            if self.student_episodes is not None:
                logs |= self.student_episodes.metrics(self._total)
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss: the trained one (of TAID: at `t_end`, so that evaluations compare), and cross-entropy."""
        model = self.model_wrapped
        model.eval()
        losses = [self._token_loss(self.settings.taid.t_end), CROSS_ENTROPY]
        sums = torch.zeros(len(losses) + 1, device=self.args.device)
        size = self.args.per_device_train_batch_size * self.args.world_size
        with torch.no_grad():
            for start in range(0, len(self.eval_dataset), size):
                part = self.eval_dataset[start : start + size][self.args.process_index :: self.args.world_size]
                batch = self._prepare_inputs(collate(part, pad_token_id=self.pad_token_id))
                values = self._forward(model, batch, losses, 1)
                sums += torch.cat([values, (batch["labels"][:, 1:] != IGNORE).sum()[None]])
        *totals, num_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss, cross_entropy = (total / num_tokens for total in totals)
        if self.student_episodes is not None:
            self.student_episodes.observe(loss=loss, cross_entropy=cross_entropy)
        self.log({"held_out_loss": loss, "held_out_cross_entropy": cross_entropy})
        metrics = {"eval_loss": loss}
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.student_episodes is not None:
            self.student_episodes.save_state(folder)
        if self.is_world_process_zero():
            atomic_write_text(folder / STATE, json.dumps({"taid": asdict(self.taid_state)}))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            seal(folder, step=self.state.global_step, world_size=self.args.world_size)

    def load_state(self, folder: Path) -> None:
        """What Hugging Face's own state does not hold; `train(resume_from_checkpoint=folder)` loads the rest."""
        self.taid_state = TaidState(**json.loads((folder / STATE).read_text())["taid"])
        if self.student_episodes is not None:
            self.student_episodes.load_state(folder)


def _enable_fsdp_on_cpu(trainer: Trainer) -> None:
    """Accelerate shards on every device but the CPU (state.py); torch's FSDP2 itself runs there, over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
