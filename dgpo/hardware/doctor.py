"""`dgpo doctor`: what this machine and environment have, a line each: ok, or what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dgpo.config.model_files import hub_answers
from dgpo.config.schema import AskConfig, Config
from dgpo.errors import ConfigError, DgpoError
from dgpo.hardware.machine import LEAST_SHARED_MEMORY, WITHOUT_FLASH_ATTENTION, Machine, check_driver, this_machine

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("cpu", "gpu", "retriever", "retriever-gpu")
LEAST_MEMORY, LEAST_DISK = 12e9, 10e9  # bytes, of the quickstart
PROBE_TIMEOUT_S = 120
# A tensor that one process makes and another reads: how new weights reach an engine.
IPC = """
import sys, torch, torch.multiprocessing as mp
def read(queue, answer): answer.put(float(queue.get().sum()))
if __name__ == "__main__":
    context = mp.get_context("spawn")
    queue, answer = context.Queue(), context.Queue()
    process = context.Process(target=read, args=(queue, answer))
    process.start()
    tensor = torch.ones(1000, device=sys.argv[1])
    queue.put(tensor)
    total = answer.get(timeout=100)
    process.join()
    sys.exit(total != 1000)
"""


@dataclass(frozen=True)
class Finding:
    """`problem`: what to do; None where all is well."""

    name: str
    text: str
    problem: str | None = None


def doctor(config: Config) -> None:
    """Prints the findings as they come. Raises `DgpoError` unless all is well."""
    well = True
    machine = this_machine()
    for look in LOOKS:
        for finding in look(machine, config):
            well = well and finding.problem is None
            mark, end = ("ok  ", "") if finding.problem is None else ("FIX ", f": {finding.problem}")
            print(f"{mark}{finding.name:12} {finding.text}{end}", flush=True)
    if not well:
        raise DgpoError("not all is well, see the lines above")


def _python(machine: Machine, config: Config) -> Iterator[Finding]:
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding("Python", f"{platform.python_version()} at {sys.prefix}", None if right else "use 3.11 or 3.12")


def _packages(machine: Machine, config: Config) -> Iterator[Finding]:
    stamps = [path.name for path in Path(sys.prefix).glob("dgpo-installed-*")]
    kinds = [kind for kind in KINDS if any(re.fullmatch(rf"dgpo-installed-{kind}-\w+", name) for name in stamps)]
    kind = kinds[0] if kinds else min(KINDS[:2], key=lambda each: len(differing(each)))
    others = [name for name in differing(kind) if name != "flash-attn"]  # it may be left out, and has a line of its own
    text = f"the {kind} set, {len(locked(kind))} packages"
    shown = f"{len(others)} are not as locked ({', '.join(others[:5])}): bash scripts/install.sh {kind}"
    yield Finding("packages", text, shown if others else None)


def locked(kind: str) -> dict[str, str]:
    """Versions by name, of requirements/<kind>.lock."""
    text = (ROOT / "requirements" / f"{kind}.lock").read_text()
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE))


def differing(kind: str) -> list[str]:
    """Names of the locked packages that are not installed, or in another version."""
    return [name for name, wanted in locked(kind).items() if _installed(name) != wanted]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sizes(machine: Machine, config: Config) -> Iterator[Finding]:
    yield Finding("cores", str(machine.cores))
    little = None if machine.memory >= LEAST_MEMORY else "the quickstart needs 12 GB"
    yield Finding("memory", f"{machine.memory / 1e9:.1f} GB", little)
    small = "start the container with --ipc=host or --shm-size=64g (docs/containers.md)"
    enough = machine.shared_memory >= LEAST_SHARED_MEMORY
    yield Finding("/dev/shm", f"{machine.shared_memory / 1e9:.2f} GB", None if enough else small)


def _gpus(machine: Machine, config: Config) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("GPUs", "none that nvidia-smi shows: use hardware=cpu")
        return
    for number, gpu in enumerate(machine.gpus):
        yield Finding("GPU", f"{number}: {gpu.name}, {gpu.free / 2**30:.1f} of {gpu.memory / 2**30:.1f} GiB free")
    driver = machine.gpus[0].driver
    try:
        check_driver(driver)
        yield Finding("driver", driver)
    except ConfigError as error:
        yield Finding("driver", driver, str(error))
    has_cuda = _run("import torch; raise SystemExit(not torch.cuda.is_available())") is None
    yield Finding("CUDA", "torch", None if has_cuda else "torch finds no GPU: is this the gpu set, and the driver new?")
    failure = share_tensor("cuda")
    yield Finding("CUDA IPC", "between two processes", failure and f"new weights cannot reach an engine: {failure}")
    flash = _run("import torch, flash_attn_2_cuda")
    way = f"install it (scripts/install.sh), or train with {WITHOUT_FLASH_ATTENTION}"
    absent = importlib.util.find_spec("flash_attn") is None
    yield Finding("flash-attn", "loads" if flash is None else "absent" if absent else "does not load", flash and way)


def _compiling(machine: Machine, config: Config) -> Iterator[Finding]:
    needed = bool(machine.gpus)  # kernels are compiled while a stage runs
    absent = "install gcc, or set CC" if needed else None
    yield Finding("compiler", machine.compiler or "none", None if machine.compiler else absent)
    missing = "install python3-dev, or use pixi's Python" if needed else None
    yield Finding("Python.h", str(machine.headers or "none"), None if machine.headers else missing)


def _network(machine: Machine, config: Config) -> Iterator[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = "answers" if hub_answers() else "does not answer: only cached models can be used (docs/offline.md)"
    yield Finding("hub", f"{endpoint} {answers}")
    for name, port in (("retriever", 8000), ("ask", AskConfig.port)):
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        key = "--port of retriever.serve" if name == "retriever" else "ask.port"
        yield Finding(f"port {port}", f"{'taken' if taken else 'free'}; {name}'s default ({key})")


def _disk(machine: Machine, config: Config) -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, folder in (("run_dir", Path(config.run_dir)), ("HF_HOME", home), ("temporary", Path("/tmp"))):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(there).free
        full = None if free >= LEAST_DISK else "the quickstart needs 10 GB, Wikipedia's index 70"
        yield Finding("disk", f"{free / 1e9:.0f} GB free for {name} ({folder})", full)


def _run(code: str, *arguments: str) -> str | None:
    """The last line of what a Python process complains of; None where it ends well."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "probe.py"  # a file: what it spawns finds it again
        script.write_text(code)
        command = [sys.executable, str(script), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer in {PROBE_TIMEOUT_S} s"
    lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
    return None if result.returncode == 0 else lines[-1][:200]


def share_tensor(device: str) -> str | None:
    """Hands a tensor from one process to another; what went wrong, or None."""
    return _run(IPC, device)


LOOKS: tuple[Callable[[Machine, Config], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _sizes,
    _gpus,
    _compiling,
    _network,
    _disk,
)
