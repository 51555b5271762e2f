"""A stage that is asked to stop, by SIGUSR1 (a scheduler's warning before the time limit) or SIGTERM.

It ends in order, keeps what it has, and the process exits with status 75 (`EX_TEMPFAIL` of sysexits.h: try again), by
which scripts/slurm knows that `resume=true` continues. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dgpo.errors import StopRequested

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REQUEST = "stop_requested"


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM, and the SIGHUP of a closed terminal, into an exception: children of who is stopped stop too."""

    def exit_(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, exit_) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """While the context lasts, a signal raises StopRequested in the main thread."""
    with _handled_by(_raise):
        yield


@contextlib.contextmanager
def stop_file_on_signal(folder: Path) -> Iterator[None]:
    """While the context lasts, the first signal writes a file into `folder`, a second one raises StopRequested.

    For work in other processes, on this node or another, that asks `stop_requested(folder)` between its steps.
    """
    path = folder / REQUEST

    def request(number: int, frame: FrameType | None) -> None:
        if path.exists():
            _raise(number, frame)
        path.touch()
        print(f"{signal.Signals(number).name}: stops after this step; a second signal ends it at once", flush=True)

    path.unlink(missing_ok=True)  # a killed run may have left one
    try:
        with _handled_by(request):
            yield
    finally:
        path.unlink(missing_ok=True)


def stop_requested(folder: Path) -> bool:
    """Whether the driver of the stage in `folder` was asked to stop."""
    return (folder / REQUEST).exists()


@contextlib.contextmanager
def cancel_on_signal() -> Iterator[None]:
    """While the context lasts, a signal cancels the current asyncio task, which then raises StopRequested here."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    numbers: list[int] = []

    def request(number: int, _: FrameType | None) -> None:
        numbers.append(number)
        loop.call_soon_threadsafe(task.cancel)  # a signal may come while the loop sleeps

    with _handled_by(request):
        try:
            yield
        except asyncio.CancelledError:
            if not numbers:
                raise
            task.uncancel()
            raise StopRequested(_message(numbers[0])) from None


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)


def _raise(number: int, _: FrameType | None) -> None:
    raise StopRequested(_message(number))


def _message(number: int) -> str:
    return f"ended by {signal.Signals(number).name}; resume=true continues"
