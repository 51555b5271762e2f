"""Keeps vLLM's CPU linear layers reloadable."""

from __future__ import annotations

import torch


def keep_plain_linears() -> None:
    """To be called in the worker's process, before it loads a model.

    vLLM's CPU linear layers pack their weight after the first load and replace it by an empty parameter, after which
    `load_weights` fails. With this they keep it.
    """
    import vllm.model_executor.layers.utils as linear_layers
    import vllm.model_executor.layers.vocab_parallel_embedding as embedding_layers

    linear_layers.dispatch_cpu_unquantized_gemm = _plain_linear
    if hasattr(embedding_layers, "dispatch_cpu_unquantized_gemm"):
        embedding_layers.dispatch_cpu_unquantized_gemm = _plain_linear


def _plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
