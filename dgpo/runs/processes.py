"""The processes of a run on this machine: known by a mark in their environment, and gone before the run goes on.

Ray ends its workers when their driver ends or dies, but does not wait for it, and what those started may live longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

MARK = "DGPO_RUN"
POLL_S = 0.1


def mark(folder: Path) -> dict[str, str]:
    """The variable that marks the processes of the stage in `folder`."""
    return {MARK: str(folder.resolve())}


def mark_processes(folder: Path) -> None:
    """Every process that this one starts from now on carries the mark."""
    os.environ.update(mark(folder))


def run_tag() -> str:
    """Twelve digits that name this process's run in names that all runs on a machine could share."""
    return hashlib.sha256(os.environ[MARK].encode()).hexdigest()[:12]


def marked_processes(folder: Path) -> list[int]:
    """Pids of the living processes with the mark of `folder`, in ascending order; zombies have no environment."""
    wanted = f"{MARK}={folder.resolve()}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's process, or one that ended meanwhile
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(pid for pid in found if pid != os.getpid())


def end_processes(folder: Path, *, grace_s: float) -> int:
    """Waits until the processes of `folder` have ended, and kills those that have not after `grace_s` seconds.

    Returns:
        How many it killed.
    """
    deadline = time.monotonic() + grace_s
    while (left := marked_processes(folder)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)
