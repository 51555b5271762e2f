"""vLLM worker extension for the CPU that keeps plain weights, so that veRL can load new ones every step.

vLLM's CPU linear layers pack their weight after the first load and replace it by an empty parameter, after which
`load_weights` fails. Chosen by configuration: `hardware.engine.worker_extension`.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.utils as linear_layers
import vllm.model_executor.layers.vocab_parallel_embedding as embedding_layers
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


def _plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


class PlainWeightsWorkerExtension(vLLMColocateWorkerExtension):
    """veRL's own extension (weight loading, sleep) over unpacked CPU linears."""

    def __new__(cls, **kwargs: Any) -> PlainWeightsWorkerExtension:
        linear_layers.dispatch_cpu_unquantized_gemm = _plain_linear
        if hasattr(embedding_layers, "dispatch_cpu_unquantized_gemm"):
            embedding_layers.dispatch_cpu_unquantized_gemm = _plain_linear
        return super().__new__(cls, **kwargs)
