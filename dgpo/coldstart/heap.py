"""Freed memory, given back to the system: on a CPU, batches of many lengths leave glibc's heap full of holes."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from transformers import TrainerCallback

GIVE_BACK_EVERY_S = 10.0


def give_back_heap() -> None:
    """Returns the free pages of glibc's heap, also those between blocks in use; nothing under another C library."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class GiveBackHeap(TrainerCallback):
    """After a step, every `GIVE_BACK_EVERY_S`; a call takes 0.1 to 0.4 s of a heap of 7 GiB (docs/hardware.md)."""

    def __init__(self) -> None:
        self._given_back_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._given_back_s >= GIVE_BACK_EVERY_S:
            give_back_heap()
            self._given_back_s = time.monotonic()
