"""One distillation from models and examples to a Hugging Face folder: split, train, resume, save."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from dgpo.algorithms.distillation import DISTILLATION_LOSSES
from dgpo.coldstart.adapters import merged
from dgpo.coldstart.examples import TrainingExample, num_micro_batches, split_held_out
from dgpo.coldstart.heap import GiveBackHeap
from dgpo.coldstart.metrics import MetricsFile
from dgpo.coldstart.student_episodes import StudentEpisodes
from dgpo.coldstart.trainer import DistillationTrainer
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.config.stages import MODEL_STEPS
from dgpo.errors import ConfigError, StoppedOnRequestError
from dgpo.files import atomic_write_text
from dgpo.models.model_folders import write_generation_config
from dgpo.runs.checkpoints import newest_whole, set_aside_later

CHECKPOINT = "checkpoint-"  # Hugging Face's name of one, before the step
KEPT_CHECKPOINTS = 3  # the newest, the one before it in case that one is damaged, and the best


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
        ConfigError: resuming `distillm` with another number of ranks, or without an episode to hold out.
        DgpoError: the loss or its gradient is not finite.
        StoppedOnRequestError: on a signal (`dgpo.runs.stopping`); the step in progress was finished and saved.
    """
    _check(settings, teacher, examples)
    training, held_out = split_held_out(examples, share=settings.held_out_share, seed=seed)
    _check_held_out(settings, examples, held_out)
    # The held-out loss decides the best model, and when to stop; but DistiLLM answers a rise by itself.
    watched = bool(held_out) and checkpoints is not None and settings.loss != "distillm"
    steps_per_epoch = math.ceil(len(training) / settings.batch_size)
    num_steps = settings.max_steps or settings.epochs * steps_per_epoch
    state = newest_whole(checkpoints, CHECKPOINT) if checkpoints and resume else None
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        examples=training,
        held_out=held_out,
        pad_token_id=tokenizer.pad_token_id or 0,  # any id: no trained position sees padding, and Llama's have none
        settings=settings,
        num_steps=num_steps,
        args=_training_arguments(
            settings,
            hardware,
            seed=seed,
            output=checkpoints,
            every=settings.evaluate_every
            or min(math.ceil(steps_per_epoch / settings.evaluations_per_epoch), num_steps),
            held_out=bool(held_out),
            keep_best=watched,
            evaluate_first=settings.loss == "distillm" and state is None,
        ),
        callbacks=[
            MetricsFile(metrics, name=name, num_steps=num_steps, steps_per_epoch=steps_per_epoch),
            *([EarlyStoppingCallback(settings.patience)] if settings.patience and watched else []),
            *([GiveBackHeap()] if hardware.platform == "cpu" else []),
        ],
        student_episodes=student_episodes,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StopOnRequest(trainer))
    _train(trainer, checkpoints, state, name=name, num_steps=num_steps)
    _save_result(trainer, tokenizer, checkpoint)
    if watched and checkpoints is not None and not settings.lora_rank and trainer.is_world_process_zero():
        _keep_last(trainer, checkpoint, checkpoints)
    if checkpoints is not None and trainer.is_world_process_zero():
        shutil.rmtree(checkpoints)
    return {
        "episodes": len(training),
        "held_out_episodes": len(held_out),
        "trained_tokens": sum(sum(example.response_mask) for example in training),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if watched else None,
    }


def _train(
    trainer: DistillationTrainer, checkpoints: Path | None, state: Path | None, *, name: str, num_steps: int
) -> None:
    """Trains from `state`, or from the beginning, to the last step."""
    if checkpoints is not None and trainer.is_world_process_zero():
        checkpoints.mkdir(parents=True, exist_ok=True)
        set_aside_later(checkpoints, CHECKPOINT, state)
    trainer.accelerator.wait_for_everyone()
    if state is not None:
        trainer.load_state(state)
        if trainer.is_world_process_zero():
            print(f"{name}: continues from {state}", file=sys.stderr, flush=True)
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    step = trainer.state.global_step
    if trainer.stopping and step < num_steps:
        raise StoppedOnRequestError(
            f"stopped on request, saved after step {step} of {num_steps}; resume=true continues"
        )
    trainer.loss_in_head.remove()


class StopOnRequest(TrainerCallback):
    """Saves after the step during which the run was asked to stop, where there are checkpoints, and ends it."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopping and self.trainer.args.save_strategy != "no":
            control.should_save = control.should_training_stop = True


def _check(settings: DistillConfig, teacher: PreTrainedModel | None, examples: Sequence[TrainingExample]) -> None:
    if settings.loss not in DISTILLATION_LOSSES:
        raise ValueError(f"distill.loss is {settings.loss!r}; expected one of {sorted(DISTILLATION_LOSSES)}")
    if DISTILLATION_LOSSES[settings.loss].needs_teacher and teacher is None:
        raise ValueError(f"distill.loss={settings.loss} needs a teacher: set teacher.path, or distill.loss=seqkd")
    if not examples:
        raise ValueError("no episodes to distil: collect and filter first, or loosen the filter")


def _check_held_out(
    settings: DistillConfig, examples: Sequence[TrainingExample], held_out: Sequence[TrainingExample]
) -> None:
    if settings.loss == "distillm" and not held_out:
        raise ConfigError(
            f"distill.loss=distillm needs held-out episodes, and distill.held_out_share={settings.held_out_share} of "
            f"{len(examples)} episodes gives none: raise it"
        )


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
    num_ranks = hardware.num_gpus
    per_rank = math.ceil(settings.batch_size / num_ranks)
    micro_batch_size = min(settings.micro_batch_size or hardware.micro_batch_size, per_rank)
    sharding: Mapping[str, Any] = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    return TrainingArguments(
        output_dir=str(output or tempfile.gettempdir()),  # nothing is written there without checkpoints
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=num_micro_batches(settings.batch_size, micro_batch_size, num_ranks),
        num_train_epochs=1,  # one pass over the batches of all steps
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_learning_rate_share},
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=on_cpu,
        # The optimiser keeps float32 weights; bfloat16 is autocast (DDP) or the cast of gathered weights (FSDP).
        bf16=hardware.dtype == "bfloat16",
        gradient_checkpointing=hardware.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if hardware.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
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
    if trainer.settings.lora_rank:
        model = merged(model)
    # Whole on rank 0, also of a sharded model: every rank takes part.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else {}
    for name in model.all_tied_weights_keys:
        weights.pop(name, None)  # gathered once more than it is kept
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(folder, state_dict=weights or None)
    tokenizer.save_pretrained(folder)
    write_generation_config(folder, fallback=model.config.to_dict())


def _keep_last(trainer: DistillationTrainer, best: Path, checkpoints: Path) -> None:
    """The last state beside the best one, as `models/last`: where the training ended, for tables that show both."""
    last = best.parent / "models" / "last"
    shutil.rmtree(last, ignore_errors=True)
    shutil.copytree(best, last)
    for file in (checkpoints / f"{CHECKPOINT}{trainer.state.global_step}").glob("*.safetensors*"):
        shutil.copy(file, last / file.name)
    steps = {"model": trainer.state.best_global_step, "last": trainer.state.global_step}
    atomic_write_text(best.parent / MODEL_STEPS, json.dumps(steps, indent=1) + "\n")
