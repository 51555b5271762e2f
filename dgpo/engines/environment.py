"""Environment variables that an engine reads when it is imported, so they must be set before."""

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
