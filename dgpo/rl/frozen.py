"""Frozen models (the teacher, the initial policy) that read positions as they did in training."""

from __future__ import annotations

from typing import Any

from torch import nn
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import TrainingWorker


class FrozenWorker(TrainingWorker):
    """veRL's, whose rotary embeddings keep their tables in float32 when the model is built in bfloat16.

    veRL casts the whole module, tables included, and a trained model's never are: it is built in float32.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        super().reset()
        restore_rotary_tables(self.engine.module)


def restore_rotary_tables(model: nn.Module) -> None:
    """Computes the tables of every rotary embedding anew: rounded to bfloat16, angles are off by up to half a radian at
    position 500, and by more behind it."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name in module._buffers):  # Gemma 3 has one for each type of layer
            anew: Any = type(module)(module.config)
            for name, table in anew.named_buffers(recurse=False):
                module.register_buffer(name, table.to(module.get_buffer(name).device), persistent=False)
