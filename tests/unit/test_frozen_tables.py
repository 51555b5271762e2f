"""Frozen models in bfloat16 keep the float32 model's table of positions, whatever their family calls it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from dgpo.rl.frozen import restore_rotary_tables
from tests.engine.families import FAMILIES, SMALL


def tables(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_table_is_the_float32_models_again(family):
    config = FAMILIES[family].config(**{**SMALL, **FAMILIES[family].settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    frozen = copy.deepcopy(model).to(torch.bfloat16)
    assert {table.dtype for table in tables(frozen).values()} == {torch.bfloat16}
    restore_rotary_tables(frozen)
    expected, restored = tables(model), tables(frozen)
    assert restored.keys() == expected.keys()
    assert len(restored) == (4 if family == "Gemma 3" else 2)
    for name, table in restored.items():
        assert table.dtype == torch.float32
        assert table.equal(expected[name])
    assert next(frozen.parameters()).dtype == torch.bfloat16
