"""GPU hours of a stage, for planning: what arithmetic says, and, of RL, what the authors' own run says."""

from __future__ import annotations

from dgpo.config.methods import has_teacher
from dgpo.config.schema import Config
from dgpo.hardware.stages import gpu_hours, stage_models

# "About one day on 8 H200s" (paper, appendix) for 1000 steps of 512 episodes with a student of 0.49 billion parameters.
# Scoring by the teacher took 9.5% of it.
PAPER_GPU_HOURS = 24 * 8
PAPER_EPISODES = 1000 * 512
PAPER_TEACHER_SHARE = 0.095
PAPER_STUDENT = 494_032_768


def gpu_hours_range(config: Config, stage: str) -> tuple[float, float] | None:
    """(at least, as the authors measured, scaled), equal where they measured nothing; None without known shapes.

    The second is scaled by episodes and parameters, which overstates larger students: much of a small one's step is
    waiting.
    """
    counted = gpu_hours(config, stage)
    if counted is None:
        return None
    measured = paper_gpu_hours(config) if stage == "train" else None
    return counted, max(counted, measured or counted)


def paper_gpu_hours(config: Config) -> float | None:
    """The authors' day of RL, scaled to this run."""
    models, _ = stage_models(config, "train")
    if models is None:
        return None
    train = config.train
    share = PAPER_TEACHER_SHARE if has_teacher(config, "train") else 0.0
    episodes = train.num_steps * train.batch_size * train.samples_per_question
    hours = PAPER_GPU_HOURS / (1 + PAPER_TEACHER_SHARE) * (1 + share)
    return hours * episodes / PAPER_EPISODES * models.student.parameters / PAPER_STUDENT
