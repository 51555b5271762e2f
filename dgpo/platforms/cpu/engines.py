"""FSDP2 engines for device `cpu`, in veRL's engine registry."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from dgpo.platforms.token_engine import TokenEngine


class UnpinnedOffload:
    """Builds frozen models without pinned memory, which needs an accelerator (transformer_impl.py pins always)."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        original = transformer_impl.CPUOffloadPolicy
        transformer_impl.CPUOffloadPolicy = lambda **_: CPUOffloadPolicy(pin_memory=False)
        try:
            return super()._build_fsdp_module(module)  # type: ignore[misc]
        finally:
            transformer_impl.CPUOffloadPolicy = original


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CPUEngineWithLMHead(UnpinnedOffload, TokenEngine):
    pass


@EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")
class CPUEngineWithValueHead(UnpinnedOffload, transformer_impl.FSDPEngineWithValueHead):
    pass
