"""The critic's attention is the one that was asked for, on every platform, and its weights the seed's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, Gemma3TextConfig

from dgpo.config.load import load_config
from dgpo.errors import ConfigError
from dgpo.hardware.checks import check_attention
from dgpo.platforms.gemma3_critic import Gemma3TextForTokenClassification
from dgpo.rl.train import own_critic
from dgpo.tinyworld.models import ModelSize, make_model, save_model
from tests.distill_stage import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# veRL's own builder, which an engine calls, with the settings that it reads.
BUILD = """
import json, sys, types, torch, verl, verl.utils.model
from transformers import AutoConfig, AutoModelForTokenClassification
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
path = sys.argv[1]
config = AutoConfig.from_pretrained(path, attn_implementation="sdpa")
model = types.SimpleNamespace(hf_config=config, local_path=path, trust_remote_code=False, model_type="value_model",
    use_liger=False, fused_kernel_options=None, use_fused_kernels=False, enable_gradient_checkpointing=False,
    lora_rank=0, lora_adapter_path=None, tokenizer=None, get=lambda *_: None)
engine = types.SimpleNamespace(engine_config=types.SimpleNamespace(model_dtype="fp32", forward_only=False),
    model_config=model, device_mesh=None, use_remove_padding=False, ulysses_sequence_parallel_size=1)
torch.manual_seed(7)
built = FSDPEngineWithValueHead._build_module(engine)
torch.manual_seed(7)
config.num_labels, config.classifier_dropout, config.hidden_dropout = 1, 0.0, "0"
plain = AutoModelForTokenClassification.from_pretrained(path, config=config, dtype=torch.float32)
same = all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), plain.state_dict().values(), strict=True))
print(json.dumps([built.config._attn_implementation, same, len(built.state_dict())]))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "dgpo.platforms.cpu"},
        {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "dgpo.platforms.cpu.platform,dgpo.platforms.critic"},
    ],
    ids=["on the CPU", "by the plugin alone"],
)
def test_verls_builder_makes_a_critic_with_the_attention_of_its_configuration(tmp_path, environment):
    tokenizer = tiny_tokenizer()
    save_model(make_model(ModelSize(hidden_size=32, num_layers=1, num_heads=1), tokenizer, seed=0), tokenizer, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    attention, same, count = json.loads(result.stdout.strip().splitlines()[-1])
    assert attention == "sdpa"
    assert same
    assert count > 10


def test_the_plugin_is_asked_for_where_flash_attention_is_not():
    assert own_critic(load_config([]).hardware) == {}
    sdpa = load_config(["hardware.attention=sdpa"]).hardware
    assert own_critic(sdpa) == {"VERL_USE_EXTERNAL_MODULES": "dgpo.platforms.critic"}


def test_packed_episodes_need_flash_attention():
    with pytest.raises(ConfigError, match=r"hardware.remove_padding=false hardware.max_tokens_per_gpu=null"):
        check_attention(load_config(["hardware.attention=sdpa"]))
    check_attention(
        load_config(["hardware.attention=sdpa", "hardware.remove_padding=false", "hardware.max_tokens_per_gpu=null"])
    )
    check_attention(load_config([]))
    check_attention(load_config(["hardware=cpu", "hardware.remove_padding=true", "hardware.max_tokens_per_gpu=2048"]))


def test_micro_batches_by_tokens_are_packed():
    with pytest.raises(
        ConfigError, match=r"max_tokens_per_gpu=2048 counts packed tokens: set hardware\.remove_padding"
    ):
        check_attention(load_config(["hardware=cpu", "hardware.max_tokens_per_gpu=2048"]))


def test_gemma_3_has_a_critic():
    """transformers knows no token classifier of its text models."""
    config = Gemma3TextConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_labels": 1, "pad_token_id": 0},
    )
    critic = AutoModelForTokenClassification.from_config(config)
    assert isinstance(critic, Gemma3TextForTokenClassification)
    assert critic(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1)
