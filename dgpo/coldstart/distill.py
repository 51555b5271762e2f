"""Phase 1b: the student learns the teacher's correct episodes, on policy tokens only.

    L = (1 - r) * CE + r * D(teacher, student)        mean over the policy tokens of the whole batch

python -m dgpo distill pair=qwen3b_05b run_dir=runs/dgpo
python -m dgpo distill experiment=taid pair=qwen3b_05b run_dir=runs/taid hardware.num_nodes=2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgpo.agent.modes import MODES, cut_to_mode, mode_messages
from dgpo.agent.protocol import encode_prompt
from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.checks import check_distill
from dgpo.coldstart.ranks import run_on_ranks
from dgpo.config.load import to_yaml
from dgpo.config.methods import has_teacher
from dgpo.config.schema import Config
from dgpo.config.stages import collection, initial_model, stage_model
from dgpo.data.rows import read_rows, row_id, row_question
from dgpo.engines.environment import export_environment
from dgpo.errors import DataError
from dgpo.hardware.dry_run import print_dry_run
from dgpo.runs.artifacts import prepare_run_folder, write_manifest
from dgpo.runs.identity import file_identity, model_identity, retriever_identity
from dgpo.runs.owner import owned
from dgpo.runs.settings import fixed_settings, is_finished, record_or_check


def distill(config: Config) -> Path | None:
    """Runs the stage: the collected episodes -> the checkpoint `{run_dir}/distill/model`.

    One GPU (or CPU rank) trains in this process; more are started over Ray, on `hardware.num_nodes` nodes.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before any model is loaded; `resume=true` under other settings; or another command
            works in the folder.
        DataError: the collection did not finish, or was changed since.
        DgpoError: the loss or its gradient is not finite; or, with `distillm`, the retriever failed too often, and
            `resume=true` continues.
    """
    notes = check_distill(config)
    collected = collection(config)
    if config.dry_run:
        print_dry_run(config, "distill", _plan(config), notes)
        return None
    output = Path(config.run_dir) / "distill"
    with owned(output):
        _distill(config, collected, output)
    return output


def distill_settings(config: Config) -> dict[str, Any]:
    """What the cold start depends on. Changes of `MAY_CHANGE` apart, its checkpoints are continued under no others."""
    episodes = collection(config) / "episodes.jsonl"
    settings = {
        **fixed_settings(config, "distill", "hardware.dtype"),
        "weights at the start": model_identity(initial_model(config, "distill")[1]),
        "weights of the teacher": model_identity(config.teacher.path or "") if has_teacher(config, "distill") else None,
        "episodes": file_identity(episodes),
    }
    if config.distill.demonstrations != "agent":  # prompts of their own
        settings["data.collect_file"] = file_identity(config.data.collect_file or "")
    if config.distill.loss != "distillm":
        return settings
    rows = [{"extra_info": {"corpus": trajectory.corpus}} for trajectory in read_trajectories(episodes)]
    searched = {"retriever": retriever_identity(config.retriever, rows)}
    return {**settings, **searched, **fixed_settings(config, "episode", "hardware.engine.dtype")}


def _distill(config: Config, collected: Path, output: Path) -> None:
    settings = distill_settings(config)
    if config.resume and is_finished(output, stage="distill", settings=settings):
        return
    prepare_run_folder(output, resume=config.resume)
    record_or_check(output, settings)
    export_environment(config.hardware)
    counts = run_on_ranks(distill_rank, config, folder=output)
    write_manifest(
        output,
        stage="distill",
        inputs={
            "student": initial_model(config, "distill")[1],
            "teacher": config.teacher.path if has_teacher(config, "distill") else None,
            "episodes": str(collected / "episodes.jsonl"),
        },
        config=to_yaml(config),
        counts=counts,
        seed=config.seed,
        settings=settings,
    )
    print(f"model in {stage_model(config, 'distill')}; next: {_next(config)}", flush=True)


def _next(config: Config) -> str:
    if "train" in config.stages:
        return f"python -m dgpo train run_dir={config.run_dir}"
    return f"python -m dgpo test run_dir={config.run_dir} test.models.agent={stage_model(config, 'distill')}"


def distill_rank(config: Config, *, rank: int = 0, num_ranks: int = 1) -> dict[str, Any]:
    """One rank's part of the stage, in its own process: loads the models, trains, and returns the counts.

    Raises:
        ValueError: the models do not share a tokenizer, and what `train_on_examples` refuses.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from dgpo.coldstart.adapters import add_adapters
    from dgpo.coldstart.examples import TrainingExample
    from dgpo.coldstart.student_episodes import StudentEpisodes
    from dgpo.coldstart.train import train_on_examples

    logging.disable_progress_bar()
    settings, hardware = config.distill, config.hardware
    student, output = initial_model(config, "distill")[1], Path(config.run_dir) / "distill"
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=config.student.trust_remote_code)
    # The optimiser keeps float32 weights; bfloat16, where asked for, is autocast in the forward pass.
    model = AutoModelForCausalLM.from_pretrained(
        student,
        dtype=torch.float32,
        attn_implementation=hardware.attention,
        trust_remote_code=config.student.trust_remote_code,
    )
    if settings.lora_rank:
        dtype = getattr(torch, hardware.dtype)
        model = add_adapters(model, rank=settings.lora_rank, dtype=dtype, seed=config.seed)
    with contextlib.ExitStack() as stack:
        student_episodes = None
        if settings.loss == "distillm":
            student_episodes = stack.enter_context(
                StudentEpisodes(
                    config, model=student, tokenizer=tokenizer, folder=output, rank=rank, num_ranks=num_ranks
                )
            )
        return train_on_examples(
            model,
            _load_teacher(config, student, tokenizer) if has_teacher(config, "distill") else None,
            [TrainingExample.from_trajectory(episode) for episode in demonstrations(config, tokenizer)],
            tokenizer,
            checkpoint=output / "model",
            metrics=output / "metrics.jsonl",
            settings=settings,
            hardware=hardware,
            seed=config.seed,
            name="distill",
            checkpoints=output / "checkpoints",
            resume=config.resume,
            student_episodes=student_episodes,
        )


def demonstrations(config: Config, tokenizer: Any) -> Iterator[Trajectory]:
    """The collected episodes; with `distill.demonstrations` of a baseline, each cut to what that one does.

    Raises:
        DataError: an episode is of no question in `data.collect_file`, which the baseline's prompt asks.
    """
    name, file = config.distill.demonstrations, config.data.collect_file or ""
    rows = {row_id(row): row for row in read_rows(file)} if name != "agent" else {}
    for episode in read_trajectories(collection(config) / "episodes.jsonl"):
        if name == "agent":
            yield episode
            continue
        row = rows.get(episode.episode_id.partition("#")[0])
        if row is None:
            raise DataError(
                f"episode {episode.episode_id!r} is of no question in data.collect_file={file}: name the file that the "
                "episodes were collected from"
            )
        messages = mode_messages(MODES[name], row_question(row), row["prompt"])
        yield cut_to_mode(episode, name, encode_prompt(tokenizer, messages))


def _load_teacher(config: Config, student: str, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, trust = config.teacher.path or "", config.teacher.trust_remote_code
    if AutoTokenizer.from_pretrained(teacher, trust_remote_code=trust).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"student {student} and teacher {teacher} have different tokenizers: "
            "distillation compares their distributions token by token, so choose two of one family"
        )
    return AutoModelForCausalLM.from_pretrained(
        teacher,
        dtype=getattr(torch, config.hardware.dtype),
        attn_implementation=config.hardware.attention,
        trust_remote_code=trust,
    )


def _plan(config: Config) -> str:
    """What would run, in one sentence."""
    settings = config.distill
    teacher = config.teacher.path if has_teacher(config, "distill") else "the teacher's tokens"
    length = f"{settings.max_steps} steps" if settings.max_steps else f"{settings.epochs} epochs"
    return (
        f"{initial_model(config, 'distill')[1]} would learn from {teacher} by {settings.loss}, {length} of "
        f"{settings.batch_size} episodes a step, from {collection(config)}"
    )
