"""Supervised training on episodes, on policy tokens only, as one Hugging Face `Trainer`.

It serves the cold start and, with `seqkd` on ideal episodes, the tiny teacher's own training.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dgpo.algorithms.distillation import DISTILLATION_LOSSES
from dgpo.config.schema import DistillConfig, HardwareConfig
from dgpo.protocol import STOP_STRINGS

IGNORE = -100  # the label of a token that is not trained (Hugging Face's convention)
# Batches whose examples are sorted by length together: less padding, yet every such group is a random sample.
BATCHES_PER_BUCKET = 8
MIN_LEARNING_RATE_SHARE = 0.05
LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class TrainingExample:
    """One episode: `response_mask` is 1 on the tokens that the policy wrote (EOS included), 0 on observations."""

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def features(self) -> dict[str, list[int]]:
        trained = [i if m else IGNORE for i, m in zip(self.response_ids, self.response_mask, strict=True)]
        return {
            "input_ids": self.prompt_ids + self.response_ids,
            "labels": [IGNORE] * len(self.prompt_ids) + trained,
        }


class BucketSampler(Sampler[int]):
    """Yields indices so that consecutive groups of `batch_size` have similar lengths, in random order."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        self.epoch += 1
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        bucket_size = BATCHES_PER_BUCKET * self.batch_size
        for start in range(0, len(order), bucket_size):
            bucket = sorted(order[start : start + bucket_size], key=self.lengths.__getitem__)
            batches = [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
            # A short last batch stays last: the loader cuts the stream every batch_size indices.
            tail = [batches.pop()] if len(batches[-1]) < self.batch_size else []
            rng.shuffle(batches)
            for batch in batches + tail:
                yield from batch


class DistillationTrainer(Trainer):
    """Trainer whose loss is one of `dgpo.algorithms.distillation`, with a frozen teacher beside the model."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        examples: Sequence[TrainingExample],
        pad_token_id: int,
        loss: str,
        kl_ratio: float,
        chunk_tokens: int,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ):
        self.pad_token_id = pad_token_id
        self.lengths = [len(example) for example in examples]
        super().__init__(
            model=model,
            args=args,
            train_dataset=[example.features() for example in examples],
            data_collator=self.collate,
            callbacks=callbacks,
        )
        # The loss below already divides by the number of trained tokens of the whole (accumulated) batch.
        self.model_accepts_loss_kwargs = True
        self.teacher = None if teacher is None else teacher.to(args.device).eval().requires_grad_(False)
        self.distillation_loss = DISTILLATION_LOSSES[loss]
        self.kl_ratio, self.chunk_tokens = kl_ratio, chunk_tokens
        self._trained: torch.Tensor | None = None
        self._hooks = [
            network.get_output_embeddings().register_forward_pre_hook(self._keep_policy_positions)
            for network in (model, self.teacher)
            if network is not None
        ]

    def remove_hooks(self) -> None:
        """Give the models their full output layer back."""
        for hook in self._hooks:
            hook.remove()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return BucketSampler(self.lengths, batch_size=batch_size, seed=self.args.seed)

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad on the right: under causal attention no trained position sees padding, so no attention mask is needed."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE}
        return {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }

    def _keep_policy_positions(self, _head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Hand the output layer only the states that predict a trained token: [B, T, H] -> [N, H].

        A hook, and not a call of the decoder itself, because the model's own forward must run under DDP and FSDP.
        """
        return (args[0][:, :-1][self._trained],)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        labels = inputs["labels"][:, 1:]
        self._trained = labels != IGNORE
        targets = labels[self._trained]
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = self.distillation_loss(
            outputs.logits,
            teacher_logits,
            targets,
            kl_ratio=self.kl_ratio,
            denominator=len(targets) if num_items_in_batch is None else num_items_in_batch,
            chunk_size=self.chunk_tokens,
        )
        # DDP averages the gradients of its ranks, but the denominator already counts the tokens of all of them.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class LossCurve(TrainerCallback):
    """Appends what the trainer logs to a jsonl file and prints a line now and then."""

    def __init__(self, path: Path, *, name: str, num_lines: int = 8):
        self.path, self.name, self.num_lines = path, name, num_lines

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        every = max(1, state.max_steps // LOG_EVERY_STEPS // self.num_lines) * LOG_EVERY_STEPS
        if state.global_step % every == 0:
            print(f"{self.name}: step {state.global_step}/{state.max_steps} loss {logs['loss']:.3f}", flush=True)


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
) -> None:
    """Train `model` in place; save a Hugging Face folder to `checkpoint` and the loss curve to the file `metrics`.

    Raises ValueError for an unknown loss, a missing teacher, no examples, or batch sizes that do not divide.
    """
    if settings.loss not in DISTILLATION_LOSSES:
        raise ValueError(f"distill.loss is {settings.loss!r}; expected one of {sorted(DISTILLATION_LOSSES)}")
    if not examples:
        raise ValueError("no episodes to distil: collect and filter first, or loosen the filter")
    micro_batch_size = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    if settings.batch_size % micro_batch_size:
        raise ValueError(
            f"distill.batch_size ({settings.batch_size}) must be a multiple of "
            f"distill.micro_batch_size ({micro_batch_size})"
        )
    checkpoint.mkdir(parents=True, exist_ok=True)
    on_cpu = hardware.platform == "cpu"
    arguments = TrainingArguments(
        output_dir=str(checkpoint),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // micro_batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": MIN_LEARNING_RATE_SHARE},
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=on_cpu,
        bf16=hardware.dtype == "bfloat16" and not on_cpu,
        gradient_checkpointing=hardware.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if hardware.gradient_checkpointing else None,
        logging_steps=LOG_EVERY_STEPS,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
    )
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        examples=examples,
        pad_token_id=tokenizer.pad_token_id,
        loss=settings.loss,
        kl_ratio=settings.kl_ratio,
        chunk_tokens=settings.chunk_tokens,
        args=arguments,
        callbacks=[LossCurve(metrics, name=name)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.remove_hooks()
    if trainer.is_world_process_zero():
        save_checkpoint(model, tokenizer, checkpoint)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that vLLM serves as a search agent: its generation config carries the stop strings."""
    generation = model.generation_config or GenerationConfig()
    generation.stop_strings = list(STOP_STRINGS)
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
