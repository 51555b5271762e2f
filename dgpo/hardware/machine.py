"""What this machine has, and whether a stage can start on it: asked in a second, before anything expensive."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import socket
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.hardware.budget import find_gpu
from dgpo.hardware.known_gpus import GIB

LEAST_DRIVER = 580  # torch's CUDA 13 build needs it
CUDA_13 = 13_000  # as libcuda counts
LEAST_SHARED_MEMORY = 1e9  # bytes; a container gets 64 MB unless told otherwise
LEAST_SHARE_OF_MEMORY = 0.95  # a GPU that reports less than this of its data sheet is another one
CPUS_PER_GPU = 3  # veRL's bundles (single_controller/ray/base.py)
WITHOUT_FLASH_ATTENTION = "hardware.attention=sdpa hardware.remove_padding=false hardware.max_tokens_per_gpu=null"
CLUSTER_TIMEOUT_S = 5.0
MAX_SOCKET_BYTES = 107
LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # with Linux's largest pid
OTHER_CPUS = 2  # the controller of its queue, and room to place what reserves nothing


@dataclass(frozen=True)
class VisibleGpu:
    """One GPU, as nvidia-smi shows it; bytes."""

    name: str
    memory: float
    free: float
    driver: str


@dataclass(frozen=True)
class Machine:
    """Bytes, and what is missing as None."""

    gpus: list[VisibleGpu]
    cores: int  # that this process may use
    memory: float  # the machine's, or that of this process's control group
    shared_memory: float
    compiler: str | None
    headers: Path | None  # Python.h


def this_machine() -> Machine:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return Machine(
        gpus=visible_gpus(),
        cores=len(os.sched_getaffinity(0)),
        memory=memory_limit(),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0.0,
        compiler=compiler,
        headers=header if header.is_file() else None,
    )


def visible_gpus() -> list[VisibleGpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves of this machine's; none where there is no nvidia-smi."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and not chosen.strip():
        return []
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *([f"--id={chosen}"] if chosen else [])]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (map(str.strip, line.rsplit(",", 3)) for line in lines)
    return [VisibleGpu(name, _mebibytes(total), _mebibytes(free), driver) for name, total, free, driver in rows]


def _mebibytes(text: str) -> float:
    return float(text) * 2**20


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes that this process may use: the machine's, or its control group's where that is less."""
    meminfo = (root / "proc/meminfo").read_text().split()
    total = float(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    limit = root / "sys/fs/cgroup/memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, float(text))


def check_start(config: Config, stage: str) -> None:
    """`check_machine`, first of all, in a real run; a dry run shows its plan first. The environment in both."""
    if config.dry_run.assume is None:
        _check_home()
        _check_cluster()
        if stage == "train":
            _check_temporary()
        if stage == "train" and config.hardware.platform == "cpu" and config.hardware.logical_cpus:
            _check_cpus(config, config.hardware.logical_cpus)
    if not config.dry_run:
        check_machine(config, stage)


def check_machine(config: Config, stage: str) -> None:
    """That a stage can start here: GPUs, their driver and free memory, compiler, shared memory, CPUs.

    Plans for other machines (`dry_run.assume`) are not checked, nor other nodes than this one.

    Raises:
        ConfigError: what is missing, in one line.
    """
    if config.dry_run.assume or config.hardware.platform != "cuda":
        return
    machine = this_machine()
    if not machine.gpus and os.environ.get("RAY_ADDRESS"):
        return  # the stage runs on the cluster's nodes
    _check_gpus(config, stage, machine.gpus)
    check_driver(machine.gpus[0].driver)
    _check_free_memory(config, stage, machine.gpus)
    _check_flash_attention(config, stage)
    _check_building(machine)
    _check_shared_memory(config, machine)
    if stage == "train":
        _check_cpus(config, config.hardware.logical_cpus or machine.cores)


def _check_home() -> None:
    """Compiled kernels and what was downloaded are cached there by libraries, which say so late and in tracebacks."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/")) / ".cache").absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"libraries cache in {place}, and {there} cannot be written to (HOME={os.environ.get('HOME')}): set HOME "
            "or XDG_CACHE_HOME to a folder of yours"
        )


def _check_cluster() -> None:
    """Ray would try an address where nobody answers for a quarter of an hour."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not address or (not colon and address in ("auto", "local")):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_TIMEOUT_S):
            return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error}); unset it to use this machine alone, or set it to "
            "host:port of the head of a cluster that runs"
        ) from None


def _check_temporary() -> None:
    """A private Ray puts sockets below it, whose names the system limits."""
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), None)
    place = os.environ[name] if name else "/tmp"
    num_bytes = len(f"{place}{LONGEST_SOCKET}".encode())
    if num_bytes > MAX_SOCKET_BYTES and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"{name}={place} makes the names of Ray's sockets {num_bytes} bytes long, and {MAX_SOCKET_BYTES} are "
            "allowed: set RAY_TMPDIR to a shorter one, such as /tmp"
        )


def _check_gpus(config: Config, stage: str, there: list[VisibleGpu]) -> None:
    hardware, gpu = config.hardware, find_gpu(config.hardware)
    # Stages that only play make do with fewer: an engine on each that is there.
    trains = stage in ("train", "distill")
    key = "hardware.gpus_per_node" if trains else "hardware.engine.tensor_parallel_size"
    needed = hardware.gpus_per_node if trains else hardware.engine.tensor_parallel_size
    if len(there) < needed:
        raise ConfigError(
            f"{key}={needed}, but nvidia-smi finds {len(there) or 'no'} GPUs on this machine: use hardware=cpu, or "
            "plan for another machine with dry_run.assume=h200x8 (or another hardware group)"
        )
    if gpu is not None:
        least = min(there[:needed], key=lambda found: found.memory)
        if least.memory < LEAST_SHARE_OF_MEMORY * gpu.memory:
            raise ConfigError(
                f"hardware.gpu={gpu.name} has {gpu.memory / GIB:.1f} GiB, but this machine's {least.name} has "
                f"{least.memory / GIB:.1f}: set hardware.gpu to what it is"
            )


def check_driver(version: str) -> None:
    """Raises `ConfigError` where the driver cannot run CUDA 13, and NVIDIA's cuda-compat does not stand in for it."""
    if int(version.partition(".")[0]) < LEAST_DRIVER and (_libcuda_version() or 0) < CUDA_13:
        raise ConfigError(
            f"the NVIDIA driver is {version}, and torch's CUDA 13 build needs {LEAST_DRIVER} or newer: update it, or, "
            "on data-centre cards, put NVIDIA's cuda-compat-13-0 on LD_LIBRARY_PATH"
        )


def _libcuda_version() -> int | None:
    try:
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value


def _check_free_memory(config: Config, stage: str, there: list[VisibleGpu]) -> None:
    """vLLM refuses to start where its share of the whole card is not free."""
    engine = config.hardware.engine
    if stage == "distill" and config.distill.loss != "distillm":
        return
    key = "gpu_memory_utilization" if stage in ("train", "distill") else "gpu_memory_utilization_alone"
    share = getattr(engine, key)
    for number, gpu in enumerate(there):
        if gpu.free < share * gpu.memory:
            most = int(100 * gpu.free / gpu.memory) / 100
            raise ConfigError(
                f"hardware.engine.{key}={share} of GPU {number} is {share * gpu.memory / GIB:.1f} GiB, but "
                f"{gpu.free / GIB:.1f} of {gpu.memory / GIB:.1f} are free: end what uses it, or set "
                f"hardware.engine.{key}={max(0.0, most - 0.01):.2f} or less"
            )


def _check_flash_attention(config: Config, stage: str) -> None:
    asked = stage in ("train", "distill") and config.hardware.attention == "flash_attention_2"
    if asked and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "hardware.attention=flash_attention_2, but flash-attn is not installed: install it (scripts/install.sh has "
            f"the ways), or train more slowly without it, {WITHOUT_FLASH_ATTENTION}"
        )


def _check_building(machine: Machine) -> None:
    """Triton compiles small launchers whenever a kernel is first used."""
    if machine.compiler is None:
        raise ConfigError("no C compiler: kernels are compiled while a stage runs; install gcc, or set CC")
    if machine.headers is None:
        raise ConfigError(
            f"no Python.h in {sysconfig.get_path('include')}: kernels are compiled while a stage runs; install "
            "Python's headers (python3-dev), or use an interpreter that has them (pixi's)"
        )


def _check_shared_memory(config: Config, machine: Machine) -> None:
    needed = max(LEAST_SHARED_MEMORY, (config.hardware.object_store_gb or 0) * 1e9)
    if machine.shared_memory < needed:
        raise ConfigError(
            f"/dev/shm has {machine.shared_memory / 1e9:.2f} GB, and Ray and NCCL need {needed / 1e9:.1f} or more: "
            "start the container with --ipc=host or --shm-size=64g (docs/containers.md)"
        )


def _check_cpus(config: Config, there: int) -> None:
    """Ray would wait without a word for CPUs that a node does not have; its count of them is bookkeeping."""
    hardware = config.hardware
    storage = -(-hardware.num_storage_units // hardware.num_nodes)
    needed = CPUS_PER_GPU * hardware.gpus_per_node + storage + OTHER_CPUS
    if there < needed and not os.environ.get("RAY_ADDRESS"):
        key = "hardware.logical_cpus" if hardware.logical_cpus else "this machine"
        raise ConfigError(
            f"{key} has {there} CPUs, and Ray places {needed} on a node ({CPUS_PER_GPU} per GPU, {storage} storage "
            f"units, {OTHER_CPUS} more): set hardware.logical_cpus={needed}, or lower hardware.num_storage_units"
        )
