"""The tiny world on disk: built where it is missing, and where its stages find their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dgpo.pipeline.processes import Stages, python_module, retrieval_server
from dgpo.runs.artifacts import MANIFEST

OVERRIDES = ("world=tiny", "hardware=cpu")
CORPUS = "real"  # holds the answers to its questions
NUM_TEST = 3000  # test questions of the worlds of `reproduce`; the held-out half has 4,800 at least, whatever the seed


def build_missing(
    stages: Stages, folder: Path, *, seed: int, num_test: int | None = None, biased: str | None = None
) -> None:
    """World, then indexes and teacher side by side, below `folder`; what is there and complete is kept.

    Args:
        num_test: test questions of the world; None: its own default.
        biased: a relation: a second teacher is made that is wrong about it.
    """
    world, indexes = folder / "world", folder / "indexes"
    teacher = world / "models" / "teacher"
    step = [*python_module("dgpo.tinyworld")]
    where = ["--out", str(world), "--seed", str(seed)]
    if not (world / MANIFEST).exists():
        more = [] if num_test is None else ["--num-test", str(num_test)]
        stages.run(world=[*step, "build", *where, *more])
    commands = {}
    if not indexes.is_dir():
        commands["index"] = [
            *python_module("retriever.build"),
            "--corpus",
            str(world / "corpora"),
            "--out",
            str(indexes),
        ]
    if not (teacher / MANIFEST).exists():
        commands["teacher"] = [*step, "teacher", *where]
    if biased and not (world / "models" / "teacher_biased" / MANIFEST).exists():
        commands["teacher_biased"] = [*step, "teacher", *where, "--biased", biased]
    if commands:
        stages.run(**commands)


@contextlib.contextmanager
def served(stages: Stages, folder: Path) -> Iterator[list[str]]:
    """Serves the world's corpora while the context lasts; yields the overrides that every stage needs."""
    with retrieval_server(stages, folder / "indexes", default=CORPUS) as url:
        yield [*inputs(folder), f"retriever.url={url}"]


def inputs(folder: Path) -> list[str]:
    """The overrides that name models and data of the world, there or still to be built."""
    data, models = folder / "world" / "data", folder / "world" / "models"
    return [
        *OVERRIDES,
        f"student.path={models / 'student_untrained'}",
        f"teacher.path={models / 'teacher'}",
        f"teacher.init={models / 'teacher_untrained'}",
        f"data.collect_file={data / 'collect.parquet'}",
        f"data.train_file={data / 'train.parquet'}",
        f"data.validation_file={data / 'validation.parquet'}",
        f"data.test_files.real={data / 'test.parquet'}",
    ]
