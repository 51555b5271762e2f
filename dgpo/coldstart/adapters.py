"""LoRA in the cold start (Hu et al. 2021, arXiv 2106.09685): few trained weights beside frozen ones, then merged."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, *, rank: int, dtype: torch.dtype, seed: int) -> Any:
    """The model with adapters on every linear layer but the output layer: y = W x + 2 B A x, B = 0 at the start.

    Args:
        model: its weights are frozen and cast.
        rank: of A and B.
        dtype: of the frozen weights; adapters stay in float32.
        seed: of A.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model.to(dtype), settings)  # type: ignore[arg-type]


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapters added to the weights, in float32."""
    return model.float().merge_and_unload()
