"""Checkpoints: there, whole, long enough, and, of two, that they fit each other."""

from __future__ import annotations

from pathlib import Path

from dgpo.agent.protocol import build_messages, encode_prompt
from dgpo.config.model_files import (
    HubUnreachableError,
    check_model_folder,
    max_positions,
    same_weights,
    tokenizer_difference,
)
from dgpo.config.schema import Config
from dgpo.config.stages import is_planned
from dgpo.errors import ConfigError

# What two tokenizers may have in other words and still do the same: Llama 3.1's template names a date, and Llama 3.2's
# asks for today's where nobody passes one.
WRITTEN_DIFFERENTLY = ("different merges", "different splitting rules", "different chat template")
SAMPLES = (
    "<think>Who was it?</think>\n<search> the 3rd novel of 1,984 </search>",
    "\n\n<information>Doc 1(Title: Brasília) founded\tin 1960.</information>\n\n",
    "<answer> São Paulo </answer>",
)


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
    if difference in WRITTEN_DIFFERENTLY and _make_the_same_ids(config, student, teacher):
        difference = None
    if difference:
        raise ConfigError(
            f"{student_key}={student} and teacher.path={teacher} have different tokenizers ({difference}): the teacher "
            "scores the student's tokens, so choose two models of one family"
        )


def _make_the_same_ids(config: Config, student: str, teacher: str) -> bool:
    """Whether both tokenizers, with the same vocabulary, cut a rendered prompt and the tags of an episode alike."""
    from transformers import AutoTokenizer

    models = ((student, config.student.trust_remote_code), (teacher, config.teacher.trust_remote_code))
    one, other = (AutoTokenizer.from_pretrained(path, trust_remote_code=trust) for path, trust in models)
    messages = build_messages("Who wrote the 2nd symphony?")
    if one.chat_template and other.chat_template and encode_prompt(one, messages) != encode_prompt(other, messages):
        return False
    return all(one.encode(text) == other.encode(text) for text in SAMPLES)


def check_lengths(config: Config, key: str, model: str | None) -> None:
    episode = config.episode
    total = episode.max_tokens
    positions = max_positions(model or "", key=key)
    if positions is not None and total > positions:
        raise ConfigError(
            f"episode.max_prompt_tokens + max_response_tokens = {total}, but {key}={model} has {positions} "
            "positions: lower one of them"
        )
