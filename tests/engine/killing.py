"""kill -9 of a run and all that it started, as a lost node would, at a moment of the test's choosing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.conftest import ROOT, read_metrics

TIMEOUT_S = 400


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m dgpo ...` in a process group of its own, its output appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dgpo", *arguments], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )


def wait_until(process: subprocess.Popen[bytes], holds: Callable[[], bool], *, poll_s: float = 0.02) -> None:
    """Returns when `holds()`; fails if the process ends before that, or after a while."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s"
        time.sleep(poll_s)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and everything below it, at once."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=30)
    psutil.wait_procs(family, timeout=30)


def start_and_kill(arguments: Sequence[str], log: Path, holds: Callable[[], bool], *, delay_s: float = 0.0) -> None:
    """Starts the command and kills it some time after `holds()`."""
    process = start(arguments, log)
    try:
        wait_until(process, holds)
        time.sleep(delay_s)
    finally:
        kill_all(process)


def has_step(metrics: Path, step: int) -> Callable[[], bool]:
    """Whether `metrics.jsonl` has the record of a step."""
    return lambda: any(record["step"] >= step for record in read_metrics(metrics))
