"""Supervised training on episodes, on policy tokens only: Hugging Face's `Trainer` around the fused loss.

It serves the cold start and, with `seqkd` on ideal episodes, the tiny teacher's own training. Optimiser, scheduler,
accumulation, mixed precision, DDP, FSDP2 and checkpoints are Hugging Face's; the loss is `dgpo.algorithms`'.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dgpo.algorithms.distillation import DISTILLATION_LOSSES, LossSettings, TokenLoss
from dgpo.algorithms.fused_linear import fused_linear_loss
from dgpo.algorithms.taid import TaidSchedule, TaidState, initial_state, update_state
from dgpo.artifacts import atomic_write_text
from dgpo.coldstart.checkpoints import check_settings, latest_checkpoint, mark_complete, remove_half_written
from dgpo.coldstart.errors import DivergedError
from dgpo.coldstart.examples import (
    IGNORE,
    StepBatches,
    TrainingExample,
    collate,
    num_micro_batches,
    split_held_out,
)
from dgpo.coldstart.metrics import MetricsFile, StepClock
from dgpo.coldstart.student_episodes import StudentEpisodes
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.protocol import STOP_STRINGS

MIN_LEARNING_RATE_SHARE = 0.05
KEPT_CHECKPOINTS = 3  # the newest, the one before it in case that one is half-written, and the best
STATE = "distill.json"
# May differ between a run and its continuation.
FREE_SETTINGS = ("micro_batch_size", "chunk_tokens", "patience", "episodes", "init")


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
        self.teacher = None if teacher is None else teacher.to(args.device).eval().requires_grad_(False)
        self.student_episodes = student_episodes
        self.taid = TaidSchedule(num_steps=num_steps, **asdict(settings.taid))
        self.taid_state = initial_state(self.taid)
        self.clock = StepClock()
        self.loss_in_head = LossInHead(model, self._losses)
        self._batch: dict[str, Any] = {}
        self._step_loss = torch.zeros((), device=args.device)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args and not self.is_fsdp_enabled:
            _enable_fsdp_on_cpu(self)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

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
            parts = self._choose_episodes(parts)
        batches = [collate(part, pad_token_id=self.pad_token_id) for part in parts]
        self._num_tokens = sum(len(example) for part in parts for example in part)
        return batches, self._get_num_items_in_batch(batches, device)

    def _choose_episodes(self, parts: list[list[TrainingExample]]) -> list[list[TrainingExample]]:
        """The teacher's episodes as they came, or the student's in their place, in as many micro-batches."""
        chosen = self.student_episodes.choose(
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
        self._batch = {"kept": kept, "targets": labels[kept], "losses": losses, "denominator": denominator}
        if self.teacher is not None:
            with torch.no_grad():
                states = self.teacher.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            self._batch["teacher_hidden"] = states[:, :-1][kept]
        return model(input_ids=inputs["input_ids"], use_cache=False).logits

    def _losses(self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The model's output layer: [B, T, H] -> the states that predict a trained token, [N, H] -> losses."""
        batch = self._batch
        states = hidden[:, :-1][batch["kept"]]
        values = [
            fused_linear_loss(
                token_loss,
                student_hidden=states,
                student_head=head,
                student_bias=bias,
                targets=batch["targets"],
                denominator=batch["denominator"],
                teacher_hidden=batch.get("teacher_hidden"),
                teacher_head=None if self.teacher is None else self.teacher.get_output_embeddings().weight,
                chunk_size=self.settings.chunk_tokens,
            )
            for token_loss in batch["losses"]
        ]
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
        sums = torch.stack([self._step_loss, self._step_loss.new_tensor(float(self._num_tokens))])
        loss, num_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss /= self.args.world_size
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise DivergedError(
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
        losses = [self._token_loss(self.settings.taid.t_end), DISTILLATION_LOSSES["seqkd"].token_loss(NO_SETTINGS)]
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
            self.student_episodes.observe(cross_entropy)
        self.log({"held_out_loss": loss, "held_out_cross_entropy": cross_entropy})
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
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
            mark_complete(folder)

    def load_state(self, folder: Path) -> None:
        """What Hugging Face's own state does not hold; `train(resume_from_checkpoint=folder)` loads the rest."""
        self.taid_state = TaidState(**json.loads((folder / STATE).read_text())["taid"])
        if self.student_episodes is not None:
            self.student_episodes.load_state(folder)


NO_SETTINGS = LossSettings(kl_ratio=0.0, skew=0.0, jsd_beta=0.0, taid_t=0.0)  # the cross-entropy has none


def _enable_fsdp_on_cpu(trainer: Trainer) -> None:
    """Accelerate shards on every device but the CPU (state.py); torch's FSDP2 itself runs there, over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def train_on_examples(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    examples: Sequence[TrainingExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    checkpoint: Path,
    metrics: Path,
    settings: DistillConfig,
    hardware: HardwareConfig,
    seed: int,
    name: str,
    checkpoints: Path | None = None,
    resume: bool = False,
    student_episodes: StudentEpisodes | None = None,
) -> dict[str, Any]:
    """Trains `model` in place and saves it as a Hugging Face folder: its last state, or its best on held-out examples.

    Every rank calls it, with equal arguments. Without `checkpoints` the last state is saved; so it is with `distillm`,
    whose schedule answers a rise of the held-out loss with more of the student's own episodes.

    Args:
        examples: of which `settings.held_out_share` is held out, by question.
        checkpoint: the folder of the result.
        metrics: jsonl file of losses and speed.
        checkpoints: folder of the states to resume from, removed in the end; None for none.
        resume: continue from the newest whole one, if there is one.
        student_episodes: for `distillm`.

    Returns:
        Counts: episodes trained on and held out, trained tokens per epoch, steps done, and the step of the best model.

    Raises:
        ValueError: unknown loss, missing teacher, or no examples.
        CheckpointMismatchError: resuming under other settings.
        DivergedError: the loss or its gradient is not finite.
    """
    _check(settings, teacher, examples)
    training, held_out = split_held_out(examples, share=settings.held_out_share, seed=seed)
    if settings.loss == "distillm" and not held_out:
        raise ValueError(
            f"distill.loss=distillm needs held-out episodes, and distill.held_out_share={settings.held_out_share} of "
            f"{len(examples)} episodes gives none: raise it"
        )
    # The held-out loss decides the best model, and when to stop; but DistiLLM answers a rise by itself.
    watched = bool(held_out) and checkpoints is not None and settings.loss != "distillm"
    steps_per_epoch = math.ceil(len(training) / settings.batch_size)
    num_steps = settings.max_steps or settings.epochs * steps_per_epoch
    state = latest_checkpoint(checkpoints) if checkpoints and resume else None
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        examples=training,
        held_out=held_out,
        pad_token_id=tokenizer.pad_token_id,
        settings=settings,
        num_steps=num_steps,
        args=_training_arguments(
            settings,
            hardware,
            seed=seed,
            output=checkpoints,
            every=settings.evaluate_every or min(steps_per_epoch, num_steps),
            held_out=bool(held_out),
            keep_best=watched,
            evaluate_first=settings.loss == "distillm" and state is None,
        ),
        callbacks=[
            MetricsFile(metrics, name=name, num_steps=num_steps, steps_per_epoch=steps_per_epoch),
            *([EarlyStoppingCallback(settings.patience)] if settings.patience and watched else []),
        ],
        student_episodes=student_episodes,
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoints is not None and trainer.is_world_process_zero():
        checkpoints.mkdir(parents=True, exist_ok=True)
        recorded = {key: value for key, value in asdict(settings).items() if key not in FREE_SETTINGS}
        check_settings(checkpoints, {**recorded, "seed": seed, "episodes": len(examples)})
        remove_half_written(checkpoints)
    trainer.accelerator.wait_for_everyone()
    if state is not None:
        trainer.load_state(state)
        if trainer.is_world_process_zero():
            print(f"{name}: continues from {state}", file=sys.stderr, flush=True)
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    trainer.loss_in_head.remove()
    _save_result(trainer, tokenizer, checkpoint)
    if checkpoints is not None and trainer.is_world_process_zero():
        shutil.rmtree(checkpoints)
    return {
        "episodes": len(training),
        "held_out_episodes": len(held_out),
        "trained_tokens": sum(sum(example.response_mask) for example in training),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if watched else None,
    }


def _check(settings: DistillConfig, teacher: PreTrainedModel | None, examples: Sequence[TrainingExample]) -> None:
    if settings.loss not in DISTILLATION_LOSSES:
        raise ValueError(f"distill.loss is {settings.loss!r}; expected one of {sorted(DISTILLATION_LOSSES)}")
    if DISTILLATION_LOSSES[settings.loss].needs_teacher and teacher is None:
        raise ValueError(f"distill.loss={settings.loss} needs a teacher: set teacher.path, or distill.loss=seqkd")
    if not examples:
        raise ValueError("no episodes to distil: collect and filter first, or loosen the filter")


def _training_arguments(
    settings: DistillConfig,
    hardware: HardwareConfig,
    *,
    seed: int,
    output: Path | None,
    every: int,
    held_out: bool,
    keep_best: bool,
    evaluate_first: bool,
) -> TrainingArguments:
    on_cpu = hardware.platform == "cpu"
    num_ranks = hardware.num_nodes * hardware.gpus_per_node
    per_rank = math.ceil(settings.batch_size / num_ranks)
    micro_batch_size = min(settings.micro_batch_size or hardware.micro_batch_size, per_rank)
    sharding: Mapping[str, Any] = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    return TrainingArguments(
        output_dir=str(output or "unused"),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=num_micro_batches(settings.batch_size, micro_batch_size, num_ranks),
        num_train_epochs=1,  # one pass over the batches of all steps
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": MIN_LEARNING_RATE_SHARE},
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=on_cpu,
        # The optimiser keeps float32 weights; bfloat16 is autocast (DDP) or the cast of gathered weights (FSDP).
        bf16=hardware.dtype == "bfloat16",
        gradient_checkpointing=hardware.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if hardware.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        **(sharding if settings.sharding == "full" else {}),
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held_out and output else "no",
        eval_steps=every,
        eval_on_start=evaluate_first,
        save_strategy="steps" if output else "no",
        save_steps=every,
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        log_level="error",  # its warnings on resuming a model with tied embeddings are no news
        report_to="none",
    )


def _save_result(trainer: DistillationTrainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a folder that vLLM serves as a search agent: its generation config carries the stop strings."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Whole on rank 0, also of a sharded model: every rank takes part.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    for name in model.all_tied_weights_keys if weights else ():
        weights.pop(name, None)  # gathered once more than it is kept
    if not trainer.is_world_process_zero():
        return
    generation = model.generation_config or GenerationConfig()
    generation.stop_strings = list(STOP_STRINGS)
    model.generation_config = generation
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
