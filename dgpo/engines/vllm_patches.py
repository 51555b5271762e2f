"""Everything that the project changes in vLLM (0.28 on CPUs, 0.24 on GPUs), in the process that calls it.

| patch | of | what for | goes when |
|---|---|---|---|
| `run_in_process` | `vllm.v1.engine.utils.get_mp_context` | a CPU engine is a fork of the process that starts it, and imports nothing again: 2 s instead of 11 | vLLM's CPU platform lets an engine be forked |
| `tether_engine_cores` | `EngineCoreProc.run_engine_core` | an engine whose starter was killed would keep its GPU | engine processes watch their parent, as vLLM's workers do |
| `keep_plain_linears` | `dispatch_cpu_unquantized_gemm` | packed CPU layers have no weight left to replace, so that a trained student cannot be loaded | vLLM replaces weights of packed layers |
| `ask_for_matrix_tiles` | nothing: it acts before vLLM | vLLM's bfloat16 attention uses a CPU's AMX without asking the kernel, and is killed where oneDNN has not asked either | vLLM asks |

`EngineWorker` and `ReloadableEngineWorker` carry them into vLLM's workers: vLLM takes the class by its dotted name
(`worker_extension_cls`, its own extension point). RL's engines are veRL's, whose extension is
`dgpo.platforms.cpu.vllm_extension` on a CPU and veRL's own on GPUs. tests/contract.py tells when what is patched changes.
"""  # noqa: E501  a table

from __future__ import annotations

import ctypes
import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:  # whoever starts an engine need not have read torch
    import torch

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
STDERR = 2

# ---- Processes: how engines begin, and that they end with the process that started them.


def die_with_parent() -> None:
    """Lets the kernel kill this process as soon as its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: str) -> None:
    """Sets the name of this process that `ps` shows, of which the kernel keeps 15 characters (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def run_in_process() -> None:
    """From now on an engine that this process starts is a fork of it, with the model in the same process.

    For CPU engines of one thread. vLLM's CPU platform wants fresh processes, for engine and model, to preload libraries
    for many OpenMP threads; each imports for 8 s what is here already. On GPUs vLLM forks by itself.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process of its own for the model
    from vllm.v1.engine import utils

    utils.get_mp_context = functools.partial(multiprocessing.get_context, "fork")


def tether_engine_cores() -> None:
    """From now on, engine processes that vLLM starts from this one die with it.

    Their workers do so by a pipe of vLLM's own; the engine process itself has nothing of that kind in vLLM 0.28.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if EngineCoreProc.run_engine_core is not _run_tethered_engine_core:
        _vllms_own.append(EngineCoreProc.run_engine_core)
        EngineCoreProc.run_engine_core = staticmethod(_run_tethered_engine_core)


_vllms_own: list[Any] = []


def _run_tethered_engine_core(*args: Any, **kwargs: Any) -> None:
    """What the engine process runs: vLLM's own function, which in a fresh process is still in its place."""
    from vllm.v1.engine.core import EngineCoreProc

    die_with_parent()
    name_process("VLLM::EngineCore")  # vLLM's own attempt has no effect in a process forked from a Ray actor
    run = _vllms_own[0] if _vllms_own else EngineCoreProc.run_engine_core
    run(*args, **kwargs)


# ---- Linear layers on a CPU.


def keep_plain_linears() -> None:
    """To be called in the worker's process, before it loads a model whose weights will change.

    vLLM's CPU linear layers pack their weight for oneDNN after the first load and replace it by an empty parameter, so
    that `load_weights` fails.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _stay_plain


def _stay_plain(layer: torch.nn.Module, remove_weight: bool) -> None:
    from torch.nn.functional import linear

    layer.cpu_linear = linear


def ask_for_matrix_tiles() -> None:
    """To be called in the worker's process: lets it use a CPU's matrix tiles (AMX), where there are any.

    oneDNN asks the kernel for them as it starts, unless `ONEDNN_MAX_CPU_ISA` keeps it from using them.
    """
    import torch

    torch.cpu._init_amx()  # False on a CPU without them


# ---- Worker extensions, which vLLM mixes into its worker.


class EngineWorker:
    """A worker that dies with its parent, and says on stderr what signal it crashed of."""

    weights_change: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        die_with_parent()
        faulthandler.enable(STDERR)
        if kwargs["vllm_config"].device_config.device_type == "cpu":
            ask_for_matrix_tiles()
            if cls.weights_change:
                keep_plain_linears()
            if num_threads := os.environ.get("OMP_NUM_THREADS"):
                import torch

                # A forked process has the number of the one that it comes from, which may have read no variable.
                torch.set_num_threads(int(num_threads))
        return super().__new__(cls)


class ReloadableEngineWorker(EngineWorker):
    """Loads new weights into the running engine. Its method is called by name, through `collective_rpc`."""

    weights_change = True

    def load_weights_from(self, folder: str) -> None:
        """Loads the safetensors files of a Hugging Face folder over the present weights."""
        self.get_model().load_weights(_tensors(Path(folder)))  # type: ignore[attr-defined]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                yield name, tensors.get_tensor(name)
