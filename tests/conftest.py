"""Fixtures for the real engine: one small world, its index, server and models per test session."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dgpo.config.load import load_config
from dgpo.engines.environment import export_environment

with pytest.MonkeyPatch.context() as patch:  # Ray reads how clusters authenticate once, when it is imported
    patch.setenv("RAY_AUTH_MODE", "token")
    import ray  # noqa: F401

ROOT = Path(__file__).parents[1]
COMMAND_TIMEOUT_S = 400


PENDING = [line for line in (ROOT / "tests" / "pending.txt").read_text().splitlines() if line and line[0] != "#"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what tests/pending.txt names."""
    for item in items:
        if any(item.nodeid.startswith(prefix) for prefix in PENDING):
            item.add_marker("pending")


def pytest_configure() -> None:
    """Exports what the engine reads at its import: some tests import vLLM, and others, after them, need it set."""
    export_environment(load_config(["world=tiny", "hardware=cpu"]).hardware)


def run_command(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Runs `python ...` in the repository's root, its whole process group ended on a timeout."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def read_metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def retriever_process(indexes: Path, port_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real retrieval server over every index in the folder, on a free port: (process, url)."""
    command = [sys.executable, "-m", "retriever.serve", "--port", "0", "--port-file", str(port_file)]
    for folder in sorted(path for path in indexes.iterdir() if path.is_dir()):
        command += ["--index", f"{folder.name}={folder}"]
    process = subprocess.Popen([*command, "--default", "real"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert process.poll() is None, "the retrieval server ended at its start"
            assert time.monotonic() < deadline, "the retrieval server did not start in 120 s"
            time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@dataclass(frozen=True)
class TinyWorld:
    """A world with an index, a teacher that searches, and a student that has begun to."""

    folder: Path
    indexes: Path
    url: str

    @property
    def student(self) -> Path:
        """The one that has begun to search; `models/student_untrained` has not."""
        return self.folder / "models" / "student"

    def overrides(self, run_dir: Path, url: str | None = None, *, begun: bool = True) -> list[str]:
        """What every stage needs. `begun`: RL starts from the student that has begun to search."""
        data, models = self.folder / "data", self.folder / "models"
        return [
            "world=tiny",
            "hardware=cpu",
            f"run_dir={run_dir}",
            f"student.path={models / 'student_untrained'}",
            f"teacher.path={models / 'teacher'}",
            f"teacher.init={models / 'teacher_untrained'}",
            *([f"train.init={self.student}"] if begun else []),
            f"data.collect_file={data / 'collect.parquet'}",
            f"data.train_file={data / 'train.parquet'}",
            f"retriever.url={url or self.url}",
        ]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyWorld]:
    folder = tmp_path_factory.mktemp("tiny") / "world"
    indexes = folder / "indexes"
    for arguments in (
        ["-m", "dgpo.tinyworld", "build", "--out", str(folder)],
        ["-m", "dgpo.tinyworld", "teacher", "--out", str(folder)],
        ["-m", "retriever.build", "--corpus", str(folder / "corpora"), "--out", str(indexes), "--method", "bm25"],
        [str(ROOT / "tests" / "engine" / "begun_student.py"), str(folder)],
    ):
        result = run_command(*arguments)
        assert result.returncode == 0, result.stderr[-3000:]
    with retriever_process(indexes, indexes / "port") as (_, url):
        yield TinyWorld(folder, indexes, url)
