"""The exact term's teacher reads packed episodes as it reads each alone."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.nested import as_nested_tensor
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu

from dgpo.platforms.token_engine import GATE_KEY
from dgpo.rl.exact_loss import TeacherReader
from tests.engine.families import FAMILIES, SMALL

LENGTHS, GATE = (7, 31, 12), (1.0, 0.0, 1.0)


def teacher_model(family):
    torch.manual_seed(0)
    config = FAMILIES[family].config(**{**SMALL, **FAMILIES[family].settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden  # as `TokenEngine`'s, asked for nothing
    return model, head


@pytest.mark.parametrize("family", ["Qwen2.5", "Gemma 3"])
def test_packed_padded_and_alone_are_the_same(family):
    model, head = teacher_model(family)
    seen = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    episodes = [torch.randint(10, 500, (length,)) for length in LENGTHS]
    predicts = torch.ones(sum(LENGTHS), dtype=torch.bool)
    data = TensorDict(
        {"input_ids": as_nested_tensor(episodes, layout=torch.jagged), GATE_KEY: torch.tensor(GATE)}, batch_size=3
    )
    reader = TeacherReader(SimpleNamespace(module=model, output_layer=head))
    found = {}
    for is_packed in (True, False):
        tu.assign_non_tensor(data, use_remove_padding=is_packed)
        found[is_packed] = reader(data, predicts).hidden
    assert seen == [(1, 7 + 12), (2, 12)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=episodes[row][None]).logits[0] for row in (0, 2)])
    for hidden in found.values():
        assert torch.allclose(hidden, alone, atol=1e-5)
