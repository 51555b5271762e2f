import pytest
import torch

from dgpo.engines.plain_linears import MIN_PACKED_ELEMENTS, _dispatch

SMALL, LARGE = torch.nn.Linear(64, 320), torch.nn.Linear(512, MIN_PACKED_ELEMENTS // 512)


@pytest.mark.parametrize(
    ("layer", "packs", "packed"), [(SMALL, True, False), (LARGE, True, True), (LARGE, False, False)]
)
def test_only_large_layers_of_weights_that_stay_are_packed(layer, packs, packed):
    calls = []
    _dispatch(layer, True, pack=(lambda *arguments: calls.append(arguments)) if packs else None)
    assert calls == ([(layer, True)] if packed else [])
    assert (getattr(layer, "cpu_linear", None) is torch.nn.functional.linear) is not packed
    layer.__dict__.pop("cpu_linear", None)
