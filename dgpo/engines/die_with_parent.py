"""An engine must not outlive the process that started it, even when that one is killed without a chance to clean up."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any, Self

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h


def die_with_parent() -> None:
    """Lets the kernel kill this process as soon as its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: str) -> None:
    """Sets the name of this process that `ps` shows, of which the kernel keeps 15 characters (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


class DieWithParent:
    """A vLLM worker extension: the process that builds it dies with its parent."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        die_with_parent()
        return super().__new__(cls)
