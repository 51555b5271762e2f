"""RL without whole logits: veRL's FSDP engine with our output layer makes the update of whole logits."""

import json
import socket

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import ROOT, run_command
from tests.distill_stage import tiny_tokenizer

pytestmark = pytest.mark.engine

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied embeddings", "an output matrix of its own"])
def test_an_update_is_that_of_whole_logits_however_micro_batches_are_made(tmp_path, tied):
    """Padded, packed, and packed by tokens; with and without gradient checkpointing."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    models = {"student": Qwen2ForCausalLM(Qwen2Config(**sizes)), "teacher": LlamaForCausalLM(LlamaConfig(**sizes))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(ROOT / "tests" / "engine" / "token_engine_step.py")
    result = run_command(script, str(tmp_path / "student"), str(tmp_path / "teacher"), str(port))
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 6
    for way, differences in found.items():
        assert differences.pop("micro-batches") == {"padded": 2, "packed": 1}.get(way.split(", ")[0], 3), way
        assert len(differences) == 4
        assert max(differences.values()) < 1e-5, (way, differences)
