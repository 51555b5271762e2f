"""The processes that a drill starts, finds and kills. Only ever by pid, and only those of the drill's own runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dgpo.runs.processes import MARK, marked_processes

POLL_S = 0.05
RETRIEVER_START_S = 120.0


class DrillFailedError(AssertionError):
    """A drill did not end as it must; the message says what was seen and what was expected."""


def wait_for(condition: Callable[[], bool], *, bound_s: float, what: str) -> float:
    """Waits until `condition` holds. Returns the seconds that took.

    Raises:
        DrillFailedError: it did not hold within `bound_s`.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > bound_s:
            raise DrillFailedError(f"{what} did not happen within {bound_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - started


def find(folder: Path, title: str) -> list[int]:
    """Pids of the processes of the stage in `folder` that are called `title`, oldest first."""
    return [pid for pid in marked_processes(folder) if is_called(pid, title)]


def descendants(pid: int) -> list[int]:
    """Pids of what the process has started, and what that has."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [each for child in found for each in (child, *descendants(child))]


def is_called(pid: int, title: str) -> bool:
    """Whether a process has given itself this name, of which the kernel keeps 15 characters.

    Its command line may be another's: a forked engine has that of its server.
    """
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == title[:15]
    except OSError:  # it has ended
        return False


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Retriever:
    """A retrieval server over every index in a folder, which can be killed and started again on the same port."""

    def __init__(self, indexes: Path, *, default: str, log: Path) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "retriever.serve", "--port", str(self.port), "--default", default]
        for folder in sorted(path for path in indexes.iterdir() if path.is_dir()):
            self._command += ["--index", f"{folder.name}={folder}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        from dgpo.agent.search import check_health
        from dgpo.errors import ConfigError

        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

        def ready() -> bool:
            with contextlib.suppress(ConfigError):
                check_health(self.url)
                return True
            return False

        wait_for(ready, bound_s=RETRIEVER_START_S, what=f"the start of the retriever ({self.log})")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=30)


class Command:
    """`python -m dgpo STAGE ...` in a session of its own, its output in a file."""

    def __init__(self, arguments: Sequence[str], *, log: Path) -> None:
        self.log, self.stage = log, arguments[0]
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dgpo", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, *, bound_s: float) -> float:
        """Seconds until it ended; a command that does not end in time is killed, with its group."""
        try:
            return wait_for(self.ended, bound_s=bound_s, what=f"the end of the command ({self.log})")
        finally:
            self.end()

    def end(self) -> None:
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def line_with(self, text: str) -> str:
        """The last line of its output that holds `text`; empty without one."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if text in line), "")

    def message(self) -> str:
        """What it told its user in the end; the last line that it wrote, where it had no chance to."""
        return self.line_with(f"dgpo {self.stage}: ") or self.line_with("")
