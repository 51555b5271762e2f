"""The whole method on the tiny world, by the very commands that run it at scale, one process per stage.

world -> indexes + teacher (side by side) -> retrieval server -> collect -> distill -> train -> test -> report

python -m dgpo quickstart [seed=2] [key=value ...]
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dgpo.artifacts import atomic_write_text
from dgpo.config.load import load_config

STEADY_OVERRIDES = ("world=tiny", "hardware=cpu")
SERVER_START_TIMEOUT_S = 120.0
MEMORY_SAMPLE_S = 2.0
LOG_TAIL_LINES = 25


class StageFailedError(RuntimeError):
    """A stage ended with an error; the message holds the end of its log."""


class Stages:
    """Runs stages as child processes: a log file each, progress on the console, wall times kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wall_s: dict[str, float] = {}
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)

    def run(self, **commands: Sequence[str]) -> None:
        """Runs the named commands side by side and waits for all of them.

        Raises:
            StageFailedError: one failed; the others are stopped.
        """
        started = time.perf_counter()
        children = {name: self.start(name, command) for name, command in commands.items()}
        print(f"[{_clock()}] {' + '.join(commands)} ...", flush=True)
        pending = dict(children)
        try:
            while pending:
                for name, child in list(pending.items()):
                    if child.poll() is None:
                        continue
                    del pending[name]
                    self.wall_s[name] = round(time.perf_counter() - started, 1)
                    if child.returncode != 0:
                        raise StageFailedError(self._failure(name, child.returncode))
                    print(f"[{_clock()}] {name} done in {self.wall_s[name]:.0f} s", flush=True)
                time.sleep(0.1)
        finally:
            for child in pending.values():
                _stop(child)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a command in a process group of its own, its output in `logs/<name>.log`."""
        with (self.logs / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _failure(self, name: str, code: int) -> str:
        path = self.logs / f"{name}.log"
        tail = "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        return f"stage {name} ended with exit code {code}; the end of {path}:\n{tail}"


def quickstart(overrides: Sequence[str] = ()) -> Path:
    """Runs everything into a new `runs/quickstart-<date>-<time>` (or `run_dir=...`).

    Returns:
        The run folder, with `summary.json` and `report.html`.

    Raises:
        StageFailedError: a stage failed.
        ConfigError: an override is wrong; nothing was started.
    """
    started = time.perf_counter()
    config = load_config([*STEADY_OVERRIDES, *overrides])
    folder = Path(f"runs/quickstart-{datetime.now():%Y%m%d-%H%M%S}")
    if any(override.startswith("run_dir=") for override in overrides):
        folder = Path(config.run_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another run_dir")
    world = folder / "world"
    stages = Stages(folder)
    print(f"run folder: {folder}   (logs: {stages.logs})", flush=True)
    with PeakMemory() as memory:
        stages.run(world=_tiny("build", world, config.seed))
        stages.run(
            index=[*_python("retriever.build"), "--corpus", str(world / "corpora"), "--out", str(folder / "indexes")],
            teacher=_tiny("teacher", world, config.seed),
        )
        with retrieval_server(stages, folder / "indexes", default="real") as url:
            common = [*STEADY_OVERRIDES, *_paths(folder, world), f"retriever.url={url}", *overrides]
            for stage in ("collect", "distill", "train", "test"):
                stages.run(**{stage: [*_python("dgpo"), stage, *common]})
    stages.wall_s["total"] = round(time.perf_counter() - started, 1)
    _summarize(folder, stages, config, memory.peak_bytes)
    return folder


def _paths(folder: Path, world: Path) -> list[str]:
    """Where one stage finds what another wrote."""
    data, models = world / "data", world / "models"
    student, teacher = models / "student_untrained", models / "teacher"
    checkpoints = {
        "untrained": student,
        "teacher": teacher,
        "kd": folder / "distill" / "model",
        "dgpo": folder / "train" / "model",
    }
    return [
        f"run_dir={folder}",
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"data.collect_file={data / 'collect.parquet'}",
        f"data.train_file={data / 'train.parquet'}",
        f"data.validation_file={data / 'validation.parquet'}",
        f"data.test_files.real={data / 'test.parquet'}",
        f"train.init={checkpoints['kd']}",
        *(f"test.models.{name}={path}" for name, path in checkpoints.items()),
        "test.baseline=kd",
    ]


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _tiny(step: str, world: Path, seed: int) -> list[str]:
    return [*_python("dgpo.tinyworld"), step, "--out", str(world), "--seed", str(seed)]


@contextlib.contextmanager
def retrieval_server(stages: Stages, indexes: Path, *, default: str) -> Iterator[str]:
    """Serves every index below `indexes` on a free port of the loopback address while the context lasts."""
    port_file = indexes / "port"
    command = [*_python("retriever.serve"), "--port", "0", "--port-file", str(port_file), "--default", default]
    for path in sorted(indexes.iterdir()):
        if path.is_dir():
            command += ["--index", f"{path.name}={path}"]
    started = time.perf_counter()
    child = stages.start("retriever", command)
    try:
        while not port_file.exists():
            if child.poll() is not None or time.perf_counter() - started > SERVER_START_TIMEOUT_S:
                raise StageFailedError(stages._failure("retriever", child.poll() or -1))
            time.sleep(0.1)
        stages.wall_s["retriever"] = round(time.perf_counter() - started, 1)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and everything in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, 15)
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()


class PeakMemory:
    """Samples the proportional memory (PSS) of this process and all its descendants; keeps the peak."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        root = psutil.Process()
        while not self._stop.wait(MEMORY_SAMPLE_S):
            processes = [root, *root.children(recursive=True)]
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(process.pid) for process in processes))


def _pss_bytes(pid: int) -> int:
    """Proportional set size: shared pages are split among their users, so that a sum over processes is honest."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0  # the process ended meanwhile
    return 0


def _summarize(folder: Path, stages: Stages, config: Any, peak_bytes: int) -> None:
    from dgpo.evaluation.report import write_report
    from dgpo.evaluation.summary import print_summary, write_summary

    atomic_write_text(folder / "memory.txt", f"peak memory of all processes: {peak_bytes / 2**30:.2f} GiB\n")
    write_summary(folder, wall_s=stages.wall_s, config=config)
    write_report(folder)
    print_summary(folder)
    print(f"peak memory of all processes {peak_bytes / 2**30:.1f} GiB; report: {folder / 'report.html'}", flush=True)


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")
