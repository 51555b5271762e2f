"""Stages as child processes: a log file each, progress on the console, wall times and peak memory kept."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from dgpo.engines.vllm_patches import die_with_parent
from dgpo.errors import DgpoError

SERVER_START_TIMEOUT_S = 120.0
MEMORY_SAMPLE_S = 2.0
LOG_TAIL_LINES = 25
TAIL_BYTES = 4096  # a log's last line is looked for in its last bytes
LINE_WIDTH = 120


class Stages:
    """Runs stages as child processes: a log file each, progress on the console, wall times kept.

    Args:
        folder: of the run.
        report_every_s: how often the end of a running stage's log, which has its progress, is shown; None: never.
        way_on: what to do after a failure, told below it.
    """

    def __init__(self, folder: Path, *, report_every_s: float | None = None, way_on: str | None = None) -> None:
        self.folder, self.report_every_s, self.way_on = folder, report_every_s, way_on
        self.wall_s: dict[str, float] = {}
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def run(self, **commands: Sequence[str]) -> None:
        """Runs the named commands side by side and waits for all of them.

        Raises:
            DgpoError: one failed; the others are stopped.
        """
        started = time.perf_counter()
        children = {name: self.start(name, command) for name, command in commands.items()}
        print(f"[{_clock()}] {' + '.join(commands)} ...", flush=True)
        pending = dict(children)
        shown = started
        try:
            while pending:
                for name, child in list(pending.items()):
                    if child.poll() is None:
                        continue
                    del pending[name]
                    self.wall_s[name] = round(time.perf_counter() - started, 1)
                    if child.returncode != 0:
                        raise self.failure(name, child.returncode)
                    print(f"[{_clock()}] {name} done in {self.wall_s[name]:.0f} s", flush=True)
                if self.report_every_s and pending and time.perf_counter() - shown > self.report_every_s:
                    shown = time.perf_counter()
                    for name in pending:
                        seconds = shown - started
                        line = self._last_line(name) or f"no word yet after {seconds:.0f} s"
                        print(f"[{_clock()}]   {name}: {line}", flush=True)
                time.sleep(0.1)
        finally:
            for child in pending.values():
                stop(child)

    def start(
        self, name: str, command: Sequence[str], *, preexec: Callable[[], None] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command in a process group of its own, its output appended to `logs/<name>.log`."""
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=preexec
            )

    def _log(self, name: str) -> Path:
        return self.logs / f"{name.replace('/', '-')}.log"

    def _last_line(self, name: str) -> str:
        with self._log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:LINE_WIDTH]

    def failure(self, name: str, code: int) -> DgpoError:
        """What a failed stage's user needs to see: its exit code and the end of its log."""
        path = self._log(name)
        tail = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        way_on = [self.way_on] if self.way_on else []
        return DgpoError(f"stage {name} ended with exit code {code}; the end of {path}:", [*tail, *way_on])


def python_module(module: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module]


def index_folders(folder: Path) -> list[Path]:
    """The indexes of a folder by name. A hidden one is unfinished: it is being built, or its build was cut."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


@contextlib.contextmanager
def retrieval_server(stages: Stages, indexes: Path, *, default: str) -> Iterator[str]:
    """Serves every finished index below `indexes` on a free port of the loopback address while the context lasts.

    Nothing is written beside the indexes, which may be someone else's. The server dies with this process.
    """
    port_file = stages.logs / "retriever.port"
    port_file.unlink(missing_ok=True)  # a killed run may have left one
    command = [*python_module("retriever.serve"), "--port", "0", "--port-file", str(port_file), "--default", default]
    for path in index_folders(indexes):
        command += ["--index", f"{path.name}={path}"]
    started = time.perf_counter()
    child = stages.start("retriever", command, preexec=die_with_parent)
    try:
        while not port_file.exists():
            if child.poll() is not None or time.perf_counter() - started > SERVER_START_TIMEOUT_S:
                raise stages.failure("retriever", child.poll() or -1)
            time.sleep(0.1)
        stages.wall_s["retriever"] = round(time.perf_counter() - started, 1)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        stop(child)


def stop(child: subprocess.Popen[bytes]) -> None:
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


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")
