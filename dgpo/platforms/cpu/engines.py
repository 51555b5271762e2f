"""FSDP2 engines for device `cpu`, in veRL's engine registry."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForTokenClassification
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl


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
class CPUEngineWithLMHead(UnpinnedOffload, transformer_impl.FSDPEngineWithLMHead):
    pass


@EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")
class CPUEngineWithValueHead(UnpinnedOffload, transformer_impl.FSDPEngineWithValueHead):
    def _build_module(self) -> Any:
        """A token classifier with one label; veRL's own builder hard-codes flash attention (utils/model.py)."""
        config = self.model_config.hf_config
        config.num_labels, config.classifier_dropout, config.hidden_dropout = 1, 0.0, "0"
        config.summary_dropout_prob = 0.0
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype or "fp32")
        module = AutoModelForTokenClassification.from_pretrained(
            self.model_config.local_path,
            config=config,
            dtype=dtype,
            trust_remote_code=self.model_config.trust_remote_code,
        ).to(dtype)
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module
