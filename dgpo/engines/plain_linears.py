"""Which of vLLM's linear layers keep plain weights on a CPU: the small ones, and all where weights are replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

# Weights with fewer elements are read faster than oneDNN makes a kernel for a new number of tokens: 0.5 ms per layer of
# 64 x 320, with batches of ever new sizes. From 896 x 1152 on packing wins in general (scripts/bench/linears.py).
MIN_PACKED_ELEMENTS = 1 << 18


def keep_plain_linears(*, all_sizes: bool) -> None:
    """To be called in the worker's process, before it loads a model.

    vLLM's CPU linear layers pack their weight for oneDNN after the first load and replace it by an empty parameter.

    Args:
        all_sizes: no layer is packed: `load_weights` fails for those that are.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = functools.partial(
        _dispatch, pack=None if all_sizes else utils.dispatch_cpu_unquantized_gemm
    )


def _dispatch(
    layer: torch.nn.Module, remove_weight: bool, *, pack: Callable[[torch.nn.Module, bool], None] | None
) -> None:
    is_linear = layer.weight.ndim == 2  # convolutions come here too
    if pack is None or (is_linear and layer.weight.numel() < MIN_PACKED_ELEMENTS):
        layer.cpu_linear = torch.nn.functional.linear
    else:
        pack(layer, remove_weight)
