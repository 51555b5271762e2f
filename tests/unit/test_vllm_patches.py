"""Linear layers whose weights can be replaced."""

import torch
from vllm.model_executor.layers import utils

from dgpo.engines.vllm_patches import keep_plain_linears


def test_a_plain_layer_keeps_its_weight(monkeypatch):
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", None)
    keep_plain_linears()
    layer = torch.nn.Linear(2, 3)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.cpu_linear is torch.nn.functional.linear
    assert layer.weight.shape == (3, 2)
