"""Which models a stage holds, and its budget and throughput: from a configuration to the formulas."""

from __future__ import annotations

from dgpo.config.methods import algorithm_of, has_teacher
from dgpo.config.schema import Config
from dgpo.config.stages import initial_model
from dgpo.hardware.budget import Budget, Models, distill_budget, play_budget, rl_budget
from dgpo.hardware.disk import stage_disk
from dgpo.hardware.shapes import ModelShape, find_shape
from dgpo.hardware.throughput import (
    Throughput,
    collect_throughput,
    distill_throughput,
    play_throughput,
    rl_throughput,
)

PLAYING = ("collect", "test", "arcap", "ask")


def stage_models(config: Config, stage: str) -> tuple[Models | None, list[str]]:
    """The shapes of a stage's models, and the paths of those whose shape is not known (then there is no estimate)."""
    paths = {"student": _played_model(config, stage) if stage in PLAYING else initial_model(config, stage)[1]}
    if has_teacher(config, stage):
        paths["teacher"] = config.teacher.path or ""
    shapes: dict[str, ModelShape | None] = {role: find_shape(config, path) for role, path in paths.items()}
    unknown = [paths[role] for role, shape in shapes.items() if shape is None]
    student = shapes["student"]
    if unknown or student is None:
        return None, unknown
    train = config.train
    return Models(
        student=student,
        teacher=shapes.get("teacher"),
        critic=stage == "train" and algorithm_of(config).critic,
        initial_policy=stage == "train" and (train.init_kl_coef > 0 or train.stability.measure_init_kl),
    ), []


def stage_budget(config: Config, stage: str, models: Models) -> Budget:
    """Memory of a stage."""
    if stage == "train":
        return rl_budget(config, models)
    return distill_budget(config, models) if stage == "distill" else play_budget(config, models)


def stage_throughput(config: Config, stage: str, models: Models, *, rows: int | None = None) -> Throughput | None:
    """Time of a stage; `rows` are the questions, or episodes, that it was seen to have."""
    if stage == "train":
        return rl_throughput(config, models)
    if stage == "distill":
        return distill_throughput(config, models, episodes=rows)
    if stage == "collect":
        return collect_throughput(config, models, questions=rows)
    return play_throughput(config, models, questions=rows)


def gpu_hours(config: Config, stage: str) -> float | None:
    """GPU hours of a whole stage on the configured GPUs; None where a model's shape, or the GPU, is not known."""
    hours, _ = hours_and_disk(config, stage)
    return None if hours is None else hours * config.hardware.num_gpus


def hours_and_disk(config: Config, stage: str) -> tuple[float | None, float]:
    """A whole stage's hours by the clock, None where they are not known, and bytes in `run_dir`."""
    models, _ = stage_models(config, stage)
    if models is None:
        return None, 0.0
    estimate = stage_throughput(config, stage, models)
    return estimate.total_hours if estimate else None, sum(stage_disk(config, stage, models).values())


def _played_model(config: Config, stage: str) -> str:
    if stage == "collect":
        return config.teacher.path or ""
    if stage == "ask":
        return config.ask.model or ""
    return next(iter(config.test.models.values()), "")
