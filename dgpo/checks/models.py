"""Checkpoints: there, whole, long enough, and, of two, that they fit each other."""

from __future__ import annotations

from pathlib import Path

from dgpo.config.load import ConfigError
from dgpo.config.model_files import (
    HubUnreachableError,
    check_model_folder,
    max_positions,
    same_weights,
    tokenizer_difference,
)
from dgpo.config.schema import Config
from dgpo.config.stages import is_planned


def check_model(config: Config, path: str | None, *, key: str, notes: list[str]) -> bool:
    """Whether the model is there to be looked into; if not, a real run is refused and a dry run gets a note."""
    if path and not Path(path).is_dir():
        if is_planned(config, path):
            if not config.dry_run:
                stage = Path(path).relative_to(config.run_dir).parts[0]
                raise ConfigError(
                    f"{key}={path} does not exist: run the stage before it ({stage}) with this run_dir first, or set "
                    f"{key} to a checkpoint"
                )
            notes.append(f"{key}={path}: will be written by an earlier stage")
            return False
        if config.dry_run and path == config.teacher.path and config.teacher.init and Path(path).name == "model":
            notes.append(f"{key}={path}: will be made from {config.teacher.init} by experiment=teacher_ppo")
            return False
    try:
        check_model_folder(path, key=key)
    except HubUnreachableError as error:
        if not config.dry_run:
            raise
        notes.append(f"not checked: {error}")
        return False
    return True


def check_teacher(config: Config, student_key: str, student: str | None, notes: list[str]) -> None:
    """The teacher, and that it fits the student; `student` is None where that one cannot be looked into yet."""
    teacher = config.teacher.path
    if not teacher:
        raise ConfigError(
            "teacher.path is not set: name the teacher, or train without one (train.teacher_term.gate=none, "
            "distill.loss=seqkd)"
        )
    there = check_model(config, teacher, key="teacher.path", notes=notes)
    if not there or student is None:
        return
    if same_weights(student, teacher):
        raise ConfigError(
            f"the teacher is the student: {student_key}={student} and teacher.path={teacher} hold the same weights; "
            "set teacher.path to a stronger model"
        )
    difference = tokenizer_difference(student, teacher, keys=(student_key, "teacher.path"))
    if difference:
        raise ConfigError(
            f"{student_key}={student} and teacher.path={teacher} have different tokenizers ({difference}): the teacher "
            "scores the student's tokens, so choose two models of one family"
        )


def check_lengths(config: Config, key: str, model: str | None) -> None:
    episode = config.episode
    total = episode.max_prompt_tokens + episode.max_response_tokens
    positions = max_positions(model or "", key=key)
    if positions is not None and total > positions:
        raise ConfigError(
            f"episode.max_prompt_tokens + max_response_tokens = {total}, but {key}={model} has {positions} "
            "positions: lower one of them"
        )
