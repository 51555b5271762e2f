"""Step 1: what the machine and the packages must have, and that two processes and a process group can talk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from smoke.checks import Checks

from dgpo.errors import ConfigError
from dgpo.hardware.doctor import share_tensor
from dgpo.hardware.machine import LEAST_SHARED_MEMORY, check_driver, this_machine


def run(checks: Checks, *, device: str, folder: Path) -> None:
    machine = this_machine()
    if device == "cuda":
        _gpu(checks, machine.gpus[0].driver if machine.gpus else "none")
        checks.true("a C compiler", machine.compiler, machine.compiler)
        checks.true("Python.h", machine.headers, machine.headers)
        checks.number("nvcc", shutil.which("nvcc") or "none: flash-attn cannot be compiled here")
    checks.true(
        "/dev/shm of 1 GB", machine.shared_memory >= LEAST_SHARED_MEMORY, f"{machine.shared_memory / 1e9:.2f} GB"
    )
    failure = share_tensor(device)
    checks.true("a tensor reaches another process", failure is None, failure or "it does")
    _all_reduce(checks, device)


def _gpu(checks: Checks, driver: str) -> None:
    try:
        check_driver(driver)
        checks.true("the driver", True, driver)
    except ConfigError as error:
        checks.true("the driver", False, error)
    checks.true("torch finds the GPU", torch.cuda.is_available())
    free, total = torch.cuda.mem_get_info()
    checks.number("GPU", torch.cuda.get_device_name())
    checks.number("free GiB", free / 2**30)
    checks.number("of GiB", total / 2**30)
    if importlib.util.find_spec("flash_attn") is None:
        checks.number("flash-attn", "not installed: hardware.attention=sdpa")
        return
    import flash_attn_2_cuda  # noqa: F401  # the compiled part: raises where it does not fit this torch

    checks.true("flash-attn loads", True)


def _all_reduce(checks: Checks, device: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend)
    tensor = torch.ones(1000, device=device)
    dist.all_reduce(tensor)
    checks.true(f"{backend} all_reduce", float(tensor.sum()) == 1000)
    dist.destroy_process_group()
