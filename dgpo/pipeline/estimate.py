"""How many H200 hours a stage takes: arithmetic from the paper's own figure and from counted operations.

For planning only. RL is scaled from the paper's "about one day on 8 H200s" for 1000 steps of 512 episodes with a 0.5B
student, of which scoring by the teacher took 9.5%; by parameters for a larger student, which is an upper bound, because
much of a small model's step is waiting. The other stages count operations: two per parameter and token forward, six
forward and backward.
"""

from __future__ import annotations

import re

from dgpo.config.schema import Config
from dgpo.config.stages import initial_model

PAPER_GPU_HOURS = 24 * 8
PAPER_EPISODES = 1000 * 512
PAPER_TEACHER_SHARE = 0.095
PAPER_STUDENT_B = 0.5

PEAK_FLOPS = 989e12  # one H200, dense bf16
DECODE_UTILISATION = 0.05  # generation waits for memory
PREFILL_UTILISATION = 0.4
TRAIN_UTILISATION = 0.35
GENERATED_TOKENS = 250  # per episode
READ_TOKENS = 1500  # prompt and passages per episode
TEACHER_EXACT_MATCH = 0.36  # share of the teacher's episodes that are kept (paper, table 2)
TRAINING_QUESTIONS = 169_615  # NQ and HotpotQA
TEST_QUESTIONS = 51_713


def billion_parameters(model: str | None) -> float | None:
    """The size that a model's name states (`Qwen2.5-0.5B-Instruct`: 0.5), or None where it states none."""
    match = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", (model or "").lower())
    return float(match.group(1)) if match else None


def gpu_hours(config: Config, stage: str) -> float | None:
    """H200 hours of one stage, or None where a model's name does not state its size."""
    student = billion_parameters(config.student.path)
    teacher = billion_parameters(config.teacher.init) or billion_parameters(config.teacher.path)
    if student is None or teacher is None:
        return None
    if stage == "train":
        trained = teacher if initial_model(config, "train")[1] == config.teacher.init else student
        episodes = config.train.num_steps * config.train.batch_size * config.train.samples_per_question
        share = PAPER_TEACHER_SHARE if config.train.teacher_term.gate != "none" else 0.0
        hours = PAPER_GPU_HOURS / (1 + PAPER_TEACHER_SHARE) * (1 + share)
        return hours * episodes / PAPER_EPISODES * trained / PAPER_STUDENT_B
    questions = config.collect.max_questions or TRAINING_QUESTIONS
    if stage == "collect":
        return _generation_hours(teacher, questions * config.collect.samples_per_question)
    if stage == "distill":
        tokens = questions * TEACHER_EXACT_MATCH * config.distill.epochs * (GENERATED_TOKENS + READ_TOKENS)
        flops = tokens * (6 * student + (0 if config.distill.loss == "seqkd" else 2 * teacher)) * 1e9
        return flops / (PEAK_FLOPS * TRAIN_UTILISATION) / 3600
    return _generation_hours(student, TEST_QUESTIONS)


def _generation_hours(billions: float, episodes: int) -> float:
    decode = GENERATED_TOKENS * 2 * billions * 1e9 / (PEAK_FLOPS * DECODE_UTILISATION)
    prefill = READ_TOKENS * 2 * billions * 1e9 / (PEAK_FLOPS * PREFILL_UTILISATION)
    return episodes * (decode + prefill) / 3600
