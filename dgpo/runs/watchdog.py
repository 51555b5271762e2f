"""Ends the waits that would never end: a process of the run that died, and a phase that takes longer than it may.

veRL waits for finished episodes, for answers of its actors and for weights to be taken without any bound. Here the
trainer runs in a thread of its process, and the process's main thread looks after it: Ray's own actor deaths, and a
deadline per phase, become one error that names what happened, and the driver ends everything else with it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from dgpo.errors import DgpoError, FaultError
from dgpo.runs.faults import reason_of_death

POLL_S = 1.0
ANSWER_TIMEOUT_S = 60.0  # an idle actor that is asked who it is has this long
DEATH_NOTICE_S = 5.0  # after an error, until Ray has told of the death that may be behind it
NODE_NOTICE_S = 60.0  # the same of a whole node, which Ray gives up after half a minute of silence
# How gloo and NCCL say that another rank has gone.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL")
ON_PURPOSE = ("ray.kill", "INTENDED_")  # Ray's words for an actor that was ended by the run itself
LOG_TAIL_LINES = 12


class Watchdog:
    """The actors of a run, the phase that its trainer is in, and what is wrong.

    Args:
        limits: phase -> the longest it may take, in seconds.

    Attributes:
        fault: what was found; `None` while all is well. Never changes once it is set.
    """

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits
        self.fault: FaultError | None = None
        self._actors: list[_Actor] = []
        self._saves_until: float | None = None  # the trainer may go on until then, to save
        self.enter("start")

    @property
    def weights_are_whole(self) -> bool:
        """Whether the fault came in mid-rollout and left the trained weights as they are."""
        return self._saves_until is not None

    def enter(self, phase: str) -> None:
        """The trainer begins a phase."""
        self.phase, self._deadline = phase, time.monotonic() + self.limits[phase]

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside another one, which has all its time again afterwards. An error is of the inner one."""
        outer = self.phase
        self.enter(phase)
        yield
        self.enter(outer)

    def watch(self, role: str, actor: Any, *, holds_weights: bool = False) -> None:
        """Looks after an actor from now on.

        Args:
            role: what messages call it.
            holds_weights: whether the trained weights are lost with it, so that nothing can be saved any more.
        """
        if all(known.handle != actor for known in self._actors):
            self._actors = [*self._actors, _Actor(role, actor, holds_weights)]  # replaced: the other thread iterates

    def check(self) -> None:
        """Raises the fault, unless the trainer is about to save and raise it itself.

        Raises:
            FaultError: an actor died, or the phase has taken too long.
        """
        if self.fault is None:
            self._look()
        if self.fault and (self._saves_until is None or time.monotonic() > self._saves_until):
            raise self.fault

    def explain(self, error: BaseException) -> BaseException:
        """What is behind an error of the trainer: an actor's death where there is one, else the error itself."""
        if isinstance(error, DgpoError):
            return error
        peer_gone = any(words in str(error) for words in PEER_GONE)
        until = time.monotonic() + (NODE_NOTICE_S if peer_gone else DEATH_NOTICE_S)
        while self.fault is None and time.monotonic() < until:
            self._look_at_actors()
            time.sleep(0.1)
        return self.fault or error

    def _look(self) -> None:
        self._look_at_actors()
        if self.fault is None and time.monotonic() > self._deadline:
            self._report(
                f"{self.phase} took longer than train.limits.{self.phase}_s={self.limits[self.phase]:g} and was given "
                "up: a process hangs, or the limit is too low"
            )

    def _look_at_actors(self) -> None:
        for actor in self._actors:
            reason = actor.death()
            if reason:
                what = f"{actor.role} ({actor.place}) died in the {self.phase} phase: {reason}"
                self._report(what, weights_lost=actor.holds_weights, log=actor.log)
                return

    def _report(self, message: str, *, weights_lost: bool = False, log: Path | None = None) -> None:
        if self.fault is not None:  # the trainer's thread looks too, after an error
            return
        if self.phase == "rollout" and not weights_lost:
            self._saves_until = time.monotonic() + self.limits["save"]
        self.fault = FaultError(message, _tail(log))


class _Actor:
    """One actor, and the call that it will never answer once it is dead."""

    def __init__(self, role: str, handle: Any, holds_weights: bool) -> None:
        self.role, self.handle, self.holds_weights = role, handle, holds_weights
        self.place = "process unknown"
        self.log: Path | None = None
        self._whereabouts = handle.__ray_call__.remote(_whereabouts)
        self._pending = handle.__ray_ready__.remote()

    def death(self) -> str | None:
        """Why it is dead, None while it is not known to be."""
        if self._whereabouts is not None and self._answered(self._whereabouts):
            with contextlib.suppress(ray.exceptions.RayError):
                pid, host, log = ray.get(self._whereabouts, timeout=ANSWER_TIMEOUT_S)
                self.place, self.log = f"process {pid} on {host}", log
            self._whereabouts = None
        if not self._answered(self._pending):
            return None
        try:
            ray.get(self._pending, timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.ActorUnavailableError:
            pass  # Ray does not know yet
        except ray.exceptions.RayActorError as error:
            if any(words in str(error) for words in ON_PURPOSE):  # veRL closes its episode store at the end
                return None
            return reason_of_death(error)
        self._pending = self.handle.__ray_ready__.remote()
        return None

    @staticmethod
    def _answered(call: Any) -> bool:
        return bool(ray.wait([call], timeout=0)[0])


def run_watched(work: Callable[[], None], watchdog: Watchdog) -> None:
    """Runs `work` in a thread to its end, or until something is wrong; a thread that hangs is left behind.

    Raises:
        FaultError: what the watchdog found.
        Exception: what `work` raised, where no death is behind it.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            if not isinstance(error, DgpoError):
                traceback.print_exception(error)  # only its text survives the way to the driver
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    while True:
        try:
            error = ended.get(timeout=POLL_S)
        except queue.Empty:
            watchdog.check()
            continue
        if error is not None:
            raise watchdog.explain(error)
        return


def _whereabouts(_: object) -> tuple[int, str, Path | None]:
    """Process, host, and the file that Ray writes the process's errors to."""
    log = Path("/proc/self/fd/2").resolve()
    return os.getpid(), ray.util.get_node_ip_address(), log if log.is_file() else None


def _tail(log: Path | None) -> list[str]:
    """The end of a log, empty where it is on another machine."""
    try:
        lines = log.read_text(errors="replace").splitlines() if log else []
    except OSError:
        return []
    # Python's own helper speaks last, of shared memory that the dead process could not give back.
    return [line for line in lines if "resource_tracker" not in line and "warnings.warn(" not in line][-LOG_TAIL_LINES:]
