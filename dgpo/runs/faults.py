"""What ends a run from outside, told in one line: on the console, and in `failure.json` of the stage's folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dgpo.errors import DgpoError, FaultError, RunStoppedError, one_line
from dgpo.files import atomic_write_text

FAILURE = "failure.json"
# How Python, safetensors and torch.save (which drops the system's error number) say that a write failed.
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "inline_container.cc")


@contextlib.contextmanager
def translated_ray_errors(folder: Path) -> Iterator[None]:
    """Turns what Ray raises into the error that is behind it.

    Raises:
        DgpoError: the trainer's own; a FaultError where its process died, a RunStoppedError where the disk is full, or
            where it raised anything else, which is then the cause, its traceback as the log.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DgpoError):
            raise error.cause from None
        if any(words in str(error) for words in DISK_FULL):
            raise disk_full(folder) from error
        reason, kind = (str(error.cause).strip() or "no message").splitlines()[0], type(error.cause).__name__
        raise RunStoppedError(
            f"the trainer raised {kind}: {reason}; its traceback is in {folder / FAILURE}"
        ) from RunStoppedError(reason, str(error).splitlines(), kind=kind)
    except ray.exceptions.RayActorError as error:
        raise FaultError(f"the trainer's process died: {reason_of_death(error)}") from None


def reason_of_death(error: BaseException) -> str:
    """Why an actor died: what its `RayActorError` says, without the list of things that may have happened."""
    text = one_line(error)
    if "node has died" in text or "node was terminated" in text:
        return "its node is gone"
    detail = text.partition("Worker exit detail: ")[2].partition(". ")[0]
    if not detail or "connection error" in detail:
        return "it was killed, ran out of memory, or crashed"
    return detail


def disk_full(folder: Path) -> RunStoppedError:
    free_mb = shutil.disk_usage(folder).free / 1e6
    return RunStoppedError(
        f"a write to {folder} failed: the disk is full ({free_mb:.0f} MB are free now): make room, then resume=true "
        "continues",
        kind="DiskFullError",
    )


def write_failure(folder: Path, error: RunStoppedError) -> None:
    """Records why the stage in `folder` stopped: the message that the user gets, and what is known of the cause."""
    cause = error.__cause__ if isinstance(error.__cause__, RunStoppedError) else error
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": cause.kind,
        "message": str(error),
        "log": cause.log,
    }
    with contextlib.suppress(OSError):  # a full disk
        atomic_write_text(folder / FAILURE, json.dumps(record, indent=1) + "\n")


def forget_failure(folder: Path) -> None:
    """A stage that begins or goes on has not failed."""
    (folder / FAILURE).unlink(missing_ok=True)
