"""Models of the real shapes with random weights, a tokenizer, and episodes: made on the spot, from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from dgpo.coldstart.examples import TrainingExample
from dgpo.hardware.known_models import KNOWN_MODELS
from dgpo.tinyworld.tokenizer import build_tokenizer

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"head_dim": 32, "intermediate_size": 128, "vocab_size": 2048, "tie_word_embeddings": True}
POSITIONS = 8192


def make_tokenizer(vocab: int | None = None) -> PreTrainedTokenizerFast:
    """The tiny world's, with a nameless token for every further row of a model, which a random one will sample."""
    tokenizer = build_tokenizer(["Lyon", "France"], ["What is the country of ?"])
    known = len(tokenizer)
    if vocab is None or vocab <= known:
        return tokenizer
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] |= {f"unused{index}": index for index in range(known, vocab)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    return tokenizer


def save_model(name: str, folder: Path, *, seed: int, device: str) -> Path:
    """A model of a known shape with random weights in bfloat16, beside its tokenizer. Returns the folder."""
    model = make_model(name, seed=seed, device=device, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def shape(name: str, *, device: str, layers: int | None = None) -> dict[str, Any]:
    """The configuration of a known model (`dgpo.hardware.known_models`), on the CPU of a small one of its family."""
    settings = (
        dict(KNOWN_MODELS[name]) if device == "cuda" else {**SMALL, "model_type": KNOWN_MODELS[name]["model_type"]}
    )
    if device == "cpu" and name == "qwen2.5-3b":
        settings |= {"hidden_size": 96, "num_attention_heads": 3}
    return settings | ({"num_hidden_layers": layers} if layers else {})


def make_model(
    name: str,
    *,
    seed: int,
    device: str,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> Any:
    """A causal language model with random weights, on the device."""
    settings = shape(name, device=device, layers=layers)
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[settings.pop("model_type")]
    torch.manual_seed(seed)
    with torch.device(device):
        config = kind(**settings, max_position_embeddings=POSITIONS, eos_token_id=1, pad_token_id=0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def make_examples(count: int, *, vocab: int, longest: int, seed: int) -> list[TrainingExample]:
    """Episodes of different lengths: a prompt, a turn of the policy, an observation, and another turn."""
    generator = torch.Generator().manual_seed(seed)

    def ids(number: int) -> list[int]:
        return torch.randint(2, vocab, (number,), generator=generator).tolist()

    examples = []
    for index in range(count):
        turn = longest // 8 + index % (longest // 8)
        mask = [1] * turn + [0] * (longest // 4) + [1] * turn
        examples.append(TrainingExample(ids(longest // 8), ids(len(mask)), mask))
    return examples


def random_ids(*size: int, vocab: int, seed: int, device: str) -> torch.Tensor:
    return torch.randint(2, vocab, size, generator=torch.Generator().manual_seed(seed)).to(device)
