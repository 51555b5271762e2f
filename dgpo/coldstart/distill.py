"""Phase 1b: the student learns the teacher's correct episodes, on policy tokens only.

    L = (1 - r) * CE + r * KL(teacher || student)        mean over the policy tokens of the whole batch

python -m dgpo distill pair=qwen3b_05b run_dir=runs/dgpo
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dgpo.artifacts import MANIFEST, prepare_run_folder, read_manifest, write_manifest
from dgpo.coldstart.trainer import TrainingExample, train_on_examples
from dgpo.config.checks import check_distill
from dgpo.config.schema import Config, DistillConfig, HardwareConfig
from dgpo.trajectory import read_trajectories

LOSSES_WITHOUT_TEACHER = ("seqkd",)


def distill(config: Config) -> Path | None:
    """Run the stage: `{run_dir}/collect/episodes.jsonl` -> the checkpoint `{run_dir}/distill/model`.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before any model is loaded.
        ManifestError: the collection did not finish, or was changed since.
    """
    check_distill(config)
    collected = Path(config.run_dir) / "collect"
    counts = read_manifest(collected, stage="collect")["counts"]
    if config.dry_run:
        print(f"dry run: {config.student.path} would learn from {config.teacher.path} on the episodes {counts}.")
        return None
    output = prepare_run_folder(Path(config.run_dir) / "distill", resume=config.resume)
    (output / MANIFEST).unlink(missing_ok=True)
    return distill_episodes(
        student=config.student.path or "",
        teacher=config.teacher.path,
        episodes=collected / "episodes.jsonl",
        output=output,
        settings=config.distill,
        hardware=config.hardware,
        seed=config.seed,
    )


def distill_episodes(
    *,
    student: str,
    teacher: str | None,
    episodes: Path,
    output: Path,
    settings: DistillConfig,
    hardware: HardwareConfig,
    seed: int,
) -> Path:
    """Train the model at `student` on the trajectories in the file `episodes`; write `output`/model and a manifest.

    `teacher` may be None for losses without one (`seqkd`). Returns `output`.
    Raises ValueError when the models do not share a tokenizer, and for what `train_on_examples` refuses.
    """
    tokenizer = AutoTokenizer.from_pretrained(student)
    examples = [TrainingExample(t.prompt_ids, t.response_ids, t.response_mask) for t in read_trajectories(episodes)]
    # The optimiser keeps float32 weights; bfloat16, where asked for, is autocast in the forward pass.
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation=hardware.attention)
    frozen = None
    if settings.loss not in LOSSES_WITHOUT_TEACHER:
        frozen = _load_teacher(teacher, student, tokenizer, settings=settings, hardware=hardware)
    train_on_examples(
        model,
        frozen,
        examples,
        tokenizer,
        checkpoint=output / "model",
        metrics=output / "metrics.jsonl",
        settings=settings,
        hardware=hardware,
        seed=seed,
        name="distill",
    )
    if int(os.environ.get("RANK", "0")) == 0:
        write_manifest(
            output,
            stage="distill",
            inputs={"student": student, "teacher": teacher, "episodes": str(episodes)},
            config=asdict(settings),
            counts={"episodes": len(examples), "trained_tokens": sum(sum(e.response_mask) for e in examples)},
            seed=seed,
        )
    return output


def _load_teacher(
    teacher: str | None,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: DistillConfig,
    hardware: HardwareConfig,
) -> PreTrainedModel:
    if teacher is None:
        raise ValueError(f"distill.loss={settings.loss} needs a teacher: set teacher.path, or distill.loss=seqkd")
    if AutoTokenizer.from_pretrained(teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"student {student} and teacher {teacher} have different tokenizers: "
            "distillation compares their distributions token by token, so choose two of one family"
        )
    return AutoModelForCausalLM.from_pretrained(
        teacher, dtype=getattr(torch, hardware.dtype), attn_implementation=hardware.attention
    )
