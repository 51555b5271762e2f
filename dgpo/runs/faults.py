"""What ends a run from outside, told in one line: on the console, and in `failure.json` of the stage's folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dgpo.files import atomic_write_text
from dgpo.runs.stopping import StoppedOnRequestError
from dgpo.runs.stops import FaultError, RunStoppedError

FAILURE = "failure.json"
# How Python, safetensors and torch.save (which drops the system's error number) say that a write failed.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "inline_container.cc")


class DiskFullError(RunStoppedError):
    """A write failed; nothing half-written is left that a resumed run would read."""


class TrainerRaisedError(RunStoppedError):
    """Anything else that the trainer raised; `log` is its traceback."""

    def __init__(self, message: str, log: list[str]) -> None:
        super().__init__(message, log)
        self.log = log

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def told_by_name(folder: Path) -> Iterator[None]:
    """Turns what Ray raises into the error that is behind it.

    Raises:
        RunStoppedError: the trainer's own, a FaultError, a DiskFullError, or, of anything else that was raised, a
            TrainerRaisedError.
        StoppedOnRequestError: the trainer was asked to stop.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RunStoppedError | StoppedOnRequestError):
            raise error.cause from None
        if any(words in str(error) for words in DISK_FULL):
            raise disk_full(folder) from error
        reason = (str(error.cause).strip() or "no message").splitlines()[0]
        raise TrainerRaisedError(
            f"the trainer raised {type(error.cause).__name__}: {reason}; its traceback is in {folder / FAILURE}",
            str(error).splitlines(),
        ) from None
    except ray.exceptions.RayActorError as error:
        raise FaultError(f"the trainer's process died: {reason_of_death(error)}") from None


def reason_of_death(error: BaseException) -> str:
    """Why an actor died: what its `RayActorError` says, without the list of things that may have happened."""
    text = " ".join(str(error).split())
    if "node has died" in text or "node was terminated" in text:
        return "its node is gone"
    detail = text.partition("Worker exit detail: ")[2].partition(". ")[0]
    if not detail or "connection error" in detail:
        return "it was killed, ran out of memory, or crashed"
    return detail


def disk_full(folder: Path) -> DiskFullError:
    free_mb = shutil.disk_usage(folder).free / 1e6
    return DiskFullError(
        f"a write to {folder} failed for want of space ({free_mb:.0f} MB are free now): make room, then resume=true "
        "continues"
    )


def write_failure(folder: Path, error: BaseException) -> None:
    """Records why the stage in `folder` stopped: the message that the user gets, and what is known of the cause."""
    cause = error.__cause__ or error
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": type(cause).__name__,
        "message": str(error),
        "log": getattr(cause, "log", []),
    }
    with contextlib.suppress(OSError):  # a full disk
        atomic_write_text(folder / FAILURE, json.dumps(record, indent=1) + "\n")


def forget_failure(folder: Path) -> None:
    """A stage that begins or goes on has not failed."""
    (folder / FAILURE).unlink(missing_ok=True)
