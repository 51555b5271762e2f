"""LoRA adapters in a checkpoint, added to the weights that they adapt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

META = "lora_train_meta.json"  # veRL's, beside the shards
_PREFIX = "base_model.model."


def merge_adapters(state: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """W + alpha / r * B A for every adapted weight, by the model's own names; without adapters the state as it is.

    Args:
        state: name -> whole tensor, in PEFT's names where there are adapters.
        folder: of the shards; `lora_train_meta.json` there gives r and alpha.
    """
    adapted = {name.rsplit(".lora_A.", 1)[0]: name for name in state if ".lora_A." in name}
    if not adapted:
        return dict(state)
    meta = json.loads((folder / META).read_text())
    scale = meta["lora_alpha"] / meta["r"]
    merged = {}
    for name, tensor in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        module = name.removesuffix(".base_layer.weight")
        if module != name and module in adapted:
            down, up = state[adapted[module]], state[adapted[module].replace(".lora_A.", ".lora_B.")]
            tensor = (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)
        merged[name.removeprefix(_PREFIX).replace(".base_layer.", ".")] = tensor
    return merged
