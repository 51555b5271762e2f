"""Environment variables that must be set before: before an engine is imported, or before the process starts."""

from __future__ import annotations

import os
import sys

from dgpo.config.schema import HardwareConfig

# Quiet and private, unless the user's shell says otherwise, and without vLLM's cache of compiled code: engines that
# start side by side, also on other nodes, share its folder, and it has been found corrupt (vllm issue 31199).
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}
# What glibc and the loader read before the first line of Python.
READ_AT_START = ("MALLOC_", "GLIBC_TUNABLES", "LD_")


def restart_with_environment(hardware: HardwareConfig) -> None:
    """Starts this process's command again, with the same PID, where `hardware.env` has what is read at a start alone.

    For the command line, before anything else is done; a worker has the variables from the process that starts it.
    """
    late = {
        name: str(value)
        for name, value in hardware.env.items()
        if name.startswith(READ_AT_START) and os.environ.get(name) != str(value)
    }
    if late:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **late})


def export_environment(hardware: HardwareConfig) -> None:
    """Exports `hardware.env` (it wins over the shell) and quiet defaults (the shell wins over them).

    Raises:
        RuntimeError: vllm is already imported in this process and a value would change: it would not be read any more.
    """
    changed = {name: value for name, value in hardware.env.items() if os.environ.get(name) != str(value)}
    if changed and "vllm" in sys.modules:
        raise RuntimeError(
            f"vllm was imported before {', '.join(sorted(changed))} of hardware.env could be exported: "
            "call export_environment first, in a fresh process"
        )
    os.environ.update({name: str(value) for name, value in changed.items()})
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
