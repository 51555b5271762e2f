"""Tiny teacher and student in float32, as Hugging Face folders that transformers and vLLM load.

The architecture is Llama's with biases in attention, which is Qwen2's by another name: for `model_type: qwen2`
transformers 5 ignores a checkpoint's own tokenizer class and splits words by Qwen's rule instead.

The weights start from a *disclosed* initialisation that stands in for pretraining; without it the teacher reaches
an exact match of .16 instead of about .9 in the same time:
- normal with standard deviation 1/sqrt(width), residual outputs further divided by sqrt(2 * layers);
- mimetic attention (Trockman & Kolter 2023, arXiv 2305.09828): W_K = W_Q above layer 0, W_O = W_V transposed,
  which makes heads attend to equal tokens and pass them on;
- the first head of layer 0 is biased, through the rotary embedding, to attend to the previous token;
- the final norm starts at 2 instead of 1: sharper distributions, so that episodes sampled at temperature 1 succeed
  often enough to learn from.
No fact, no name and no part of the task is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dgpo.agent.protocol import STOP_STRINGS

ROPE_THETA = 10_000.0
FINAL_NORM = 2.0


@dataclass(frozen=True)
class ModelSize:
    hidden_size: int
    num_layers: int
    num_heads: int  # vLLM's CPU attention takes head sizes 32, 64, ...: hidden_size / num_heads must be one of them


TEACHER_SIZE = ModelSize(hidden_size=128, num_layers=3, num_heads=4)
STUDENT_SIZE = ModelSize(hidden_size=64, num_layers=2, num_heads=2)


def make_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model whose vocabulary and special ids are the tokenizer's."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=5 * size.hidden_size // 2,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        attention_bias=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    initialize(model, generator=torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, stop_strings=list(STOP_STRINGS)
    )
    return model


@torch.no_grad()
def initialize(model: LlamaForCausalLM, *, generator: torch.Generator) -> None:
    """Apply the disclosed initialisation of this module's docstring in place."""
    config = model.config
    residual_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if weight.ndim != 2:
            continue
        fan_in = weight.shape[1] if name.endswith("down_proj.weight") else config.hidden_size
        scale = residual_scale if name.endswith("down_proj.weight") else 1.0
        nn.init.normal_(weight, std=scale / math.sqrt(fan_in), generator=generator)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if index > 0:
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    model.model.norm.weight.fill_(FINAL_NORM)
    _bias_to_previous_token(model.model.layers[0].self_attn, head_dim=config.hidden_size // config.num_attention_heads)


def _bias_to_previous_token(attention: nn.Module, *, head_dim: int) -> None:
    """Set query and key biases of head 0 so that, after the rotary embedding, its score peaks one token back.

    With q = c e and k = c R(1) e on the fastest frequencies, the score at distance t is proportional to the sum of
    cos(frequency * (t - 1)).
    """
    half = head_dim // 2
    frequencies = ROPE_THETA ** -(torch.arange(half) / half)
    used = min(5, half)
    # Contrast between distance 1 and distance 0, so that the softmax weight does not depend on the head's size.
    contrast = (1 - torch.cos(frequencies[:used])).sum()
    strength = torch.sqrt(4 * math.sqrt(head_dim) / contrast)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[:head_dim] *= 0.1
    attention.q_proj.bias[:used] = strength
    attention.k_proj.bias[:used] = strength * torch.cos(frequencies[:used])
    attention.k_proj.bias[half : half + used] = strength * torch.sin(frequencies[:used])


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights, config, generation config and tokenizer to `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
