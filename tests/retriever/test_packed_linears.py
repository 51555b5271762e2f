"""Packed linear layers give what PyTorch's own give."""

import pytest
import torch
from torch import nn

from retriever.encoder_config import has_native_bfloat16
from retriever.packed_linears import PackedLinear, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_layer_gives_the_same_and_a_row_depends_on_no_other(dtype, bias):
    if dtype == torch.bfloat16 and not has_native_bfloat16("cpu"):
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    linear = nn.Linear(384, 1536, bias=bias).to(dtype)
    inputs = torch.randn(3, 17, 384).to(dtype)
    expected, found = linear(inputs), PackedLinear(linear)(inputs)
    assert found.shape == (3, 17, 1536)
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * 384)
    assert torch.equal(PackedLinear(linear)(inputs[1:2, :5].contiguous()), found[1:2, :5])


def test_every_linear_layer_of_a_model_is_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    inputs = torch.randn(5, 4)
    expected = model(inputs)
    pack_linears(model)
    assert [type(module) for module in model.modules()].count(PackedLinear) == 2
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs), expected.detach())
