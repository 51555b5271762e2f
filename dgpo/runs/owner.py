"""One living command per stage folder: who works in it stands in a file beside it, `<run_dir>/<stage>.owner.<n>`.

A claim is a file that did not exist before, made by a command that then sees no other claim but those that it found
dead: of two that start at the same time, or find the same dead claim, at most one goes on. Whether an owner is dead is
told by its process on the same machine; from another machine, where processes cannot be seen, by its file, which a
living owner touches every `BEAT_S` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dgpo.errors import ConfigError

BEAT_S = 10.0
SILENT_S = 90.0  # after so long without a beat, an owner on another machine counts as dead
POLL_S = 0.5


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """While the context lasts, no other command works in the stage folder, which need not exist yet.

    A claim whose command is dead is taken over. One from another machine is watched until it beats, or has been silent
    for `SILENT_S` seconds. A command whose own claim was taken over, because it was suspended for longer, ends at once.

    Raises:
        ConfigError: a living command works there; names it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim, pid, over = _claim(folder), os.getpid(), threading.Event()
    threading.Thread(target=_beat, args=(claim, folder, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if os.getpid() == pid:  # not in a copy of this process
            claim.unlink(missing_ok=True)


def refuse_if_owned(folder: Path) -> None:
    """Raises `ConfigError` where a living command of this machine works in the stage folder."""
    for claim in _claims(folder):
        if _lives_here(owner := _read(claim)):
            raise _refusal(folder, owner)


def _claim(folder: Path) -> Path:
    while True:
        dead = {claim: _wait_until_dead(claim, folder) for claim in _claims(folder)}
        mine = folder.with_name(f"{folder.name}.owner.{max(map(_number, dead), default=0) + 1}")
        try:
            descriptor = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            continue  # another was quicker: it is looked at like any
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(_myself()))
        others = {claim: _read(claim) for claim in _claims(folder) if claim != mine}
        if all(claim in dead and dead[claim] == owner for claim, owner in others.items()):
            for claim in others:
                claim.unlink(missing_ok=True)
            return mine
        mine.unlink(missing_ok=True)  # another came meanwhile, and may have gone away for this one
        time.sleep(random.uniform(0, POLL_S))


def _wait_until_dead(claim: Path, folder: Path) -> dict[str, Any]:
    """Returns what the claim says when its owner is known to be dead, or the claim gone."""
    first = last = _beat_of(claim)
    silent_since = time.monotonic() - _silence_s(claim)
    told = False
    while last is not None:
        owner = _read(claim)
        if _lives_here(owner) or last != first:
            raise _refusal(folder, owner)
        if owner.get("view") == _view() or time.monotonic() - silent_since > SILENT_S:
            return owner
        if owner and not told:
            told = True
            print(
                f"{folder} was left by {_named(owner)}, which this machine cannot see: it counts as ended when it has "
                f"been silent for {SILENT_S:g} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_S)
        last = _beat_of(claim)
    return {}


def _beat(claim: Path, folder: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        try:
            os.utime(claim)
        except FileNotFoundError:
            others = _claims(folder)
            if over.is_set() or not others:  # the user removed the run
                return
            print(f"{folder} was taken over by {_named(_read(others[-1]))}: ends", file=sys.stderr, flush=True)
            os._exit(1)  # whatever else it would write now is no longer its own to write
        except OSError:
            continue  # a file system that does not answer may do so at the next beat


def _claims(folder: Path) -> list[Path]:
    """The claims on a stage folder, in ascending order."""
    start = f"{folder.name}.owner."
    there = folder.parent.iterdir() if folder.parent.is_dir() else ()
    found = [path for path in there if path.name.startswith(start) and path.suffix[1:].isdecimal()]
    return sorted(found, key=_number)


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "started": _start_time(os.getpid()),
        "view": _view(),
        "command": shlex.join(["dgpo", *sys.argv[1:]]),
    }


def _view() -> list[str]:
    """Equal for two processes that see each other under the same numbers: the machine since its start, and its
    namespace of processes, which containers have of their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where it does not exist or is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _lives_here(owner: Mapping[str, Any]) -> bool:
    seen = owner.get("view") == _view()
    return seen and owner["started"] is not None and _start_time(owner["pid"]) == owner["started"]


def _read(claim: Path) -> dict[str, Any]:
    """What a claim says; nothing where it is gone, or not yet written to its end."""
    try:
        return json.loads(claim.read_text())
    except (OSError, ValueError):
        return {}


def _beat_of(claim: Path) -> int | None:
    """When a claim was last touched; None where it is gone."""
    try:
        return claim.stat().st_mtime_ns
    except OSError:
        return None


def _silence_s(claim: Path) -> float:
    """Seconds since the last beat, by the clock of the file system: that of this machine may be another."""
    probe = claim.with_name(f".{claim.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - claim.stat().st_mtime)
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _named(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "a command that has just begun"
    command = " ".join(owner["command"].split()[:2])  # the file holds its settings too
    return f"`{command}` on {owner['host']} (process {owner['pid']}, since {owner['since']})"


def _refusal(folder: Path, owner: Mapping[str, Any]) -> ConfigError:
    return ConfigError(f"{folder} is in use by {_named(owner)}: wait for its end, stop it, or choose another run_dir")
