"""What the drills run on: the tiny world, and two retrieval servers that share the load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dgpo.pipeline.processes import Stages, python_module
from tests.drills.processes import Retriever


@dataclass(frozen=True)
class World:
    """A tiny world below `folder`, and its retrieval servers."""

    folder: Path
    retrievers: list[Retriever]

    @property
    def overrides(self) -> list[str]:
        """What every stage needs. The policy is a trained teacher, so that it searches; no other model is needed."""
        data, teacher = self.folder / "data", self.folder / "models" / "teacher"
        return [
            "world=tiny",
            "hardware=cpu",
            f"student.path={self.folder / 'models' / 'student_untrained'}",
            f"teacher.path={teacher}",
            f"train.init={teacher}",
            f"data.collect_file={data / 'collect.parquet'}",
            f"data.train_file={data / 'train.parquet'}",
            f"data.test_files.real={data / 'test.parquet'}",
            f"retriever.url='{','.join(retriever.url for retriever in self.retrievers)}'",
        ]


@contextlib.contextmanager
def served_twice(out: Path, folder: Path | None = None, indexes: Path | None = None) -> Iterator[World]:
    """Starts both servers over a world, which is built below `out` where none is given."""
    out.mkdir(parents=True, exist_ok=True)
    folder = folder or _build(out)
    servers = [
        Retriever(indexes or folder / "indexes", default="real", log=out / f"retriever{number}.log")
        for number in (1, 2)
    ]
    try:
        for server in servers:
            server.start()
        yield World(folder, servers)
    finally:
        for server in servers:
            server.stop()


def _build(out: Path) -> Path:
    folder = out / "world"
    if not folder.exists():
        stages = Stages(out)
        make = [*python_module("dgpo.tinyworld")]
        index = [*python_module("retriever.build"), "--method", "bm25"]
        stages.run(world=[*make, "build", "--out", str(folder)])
        stages.run(
            teacher=[*make, "teacher", "--out", str(folder)],
            index=[*index, "--corpus", str(folder / "corpora"), "--out", str(folder / "indexes")],
        )
    return folder
