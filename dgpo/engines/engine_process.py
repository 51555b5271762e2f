"""How vLLM's engine processes begin, and that they end with the one that started them."""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any

from dgpo.engines.die_with_parent import die_with_parent, name_process


def run_in_process() -> None:
    """From now on an engine that this process starts is a fork of it, with the model in the same process.

    For CPU engines of one thread. vLLM's CPU platform wants fresh processes, for engine and model, to preload libraries
    for many OpenMP threads; each imports for 8 s what is here already. On GPUs vLLM forks by itself.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process of its own for the model
    from vllm.v1.engine import utils

    utils.get_mp_context = functools.partial(multiprocessing.get_context, "fork")


def bind_engine_cores() -> None:
    """From now on, engine processes that vLLM starts from this one die with it.

    Their workers do so by a pipe of vLLM's own; the engine process itself has nothing of that kind in vLLM 0.28.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if EngineCoreProc.run_engine_core is not _run_bound_engine_core:
        _vllms_own.append(EngineCoreProc.run_engine_core)
        EngineCoreProc.run_engine_core = staticmethod(_run_bound_engine_core)


_vllms_own: list[Any] = []


def _run_bound_engine_core(*args: Any, **kwargs: Any) -> None:
    """What the engine process runs: vLLM's own function, which in a fresh process is still in its place."""
    from vllm.v1.engine.core import EngineCoreProc

    die_with_parent()
    name_process("VLLM::EngineCore")  # vLLM's own attempt has no effect in a process forked from a Ray actor
    run = _vllms_own[0] if _vllms_own else EngineCoreProc.run_engine_core
    run(*args, **kwargs)
