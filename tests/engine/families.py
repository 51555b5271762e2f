"""Small models of the families, with random weights, and tokenizers of their kinds, learned from our own texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.e2e.local_hub import (
    CHAT_TEMPLATE,
    LLAMA_ROPE,
    POSITIONS,
    byte_level,
    learned,
    llama_tokenizer,
    qwen_tokenizer,
)

# Qwen3's, told not to think, begins the answer with an empty thought.
NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
THINKING_TEMPLATE = CHAT_TEMPLATE.removesuffix("{% endif %}") + NO_THOUGHT + "{% endif %}"
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def smollm_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return byte_level(special, digits=r"\p{N}", eos="<|im_end|>", template=CHAT_TEMPLATE, **names)


def qwen3_tokenizer() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    return tokenizer


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters with spaces as a letter, and bytes for what it does not know."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁]+|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = learned(tokenizer, [*special, *fallback], [])
    data = json.loads(tokenizer.to_str())  # the bytes are ordinary tokens, not special ones
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    names = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), model_max_length=POSITIONS, **names
    )
    wrapped.chat_template = GEMMA_TEMPLATE
    return wrapped


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1280,  # more rows than tokens
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """`kind`: what the README says of it; `ends`: tokens that end a turn, the tokenizer's own first."""

    kind: str
    config: Callable[..., PretrainedConfig]
    tokenizer: Callable[[], Any]
    ends: tuple[str, ...]
    settings: dict[str, Any]


FAMILIES = {
    "Qwen2.5": Family(
        "biases in attention, more rows than tokens", Qwen2Config, qwen_tokenizer, ("<|im_end|>", "<|endoftext|>"), {}
    ),
    "Llama 3.1, 3.2": Family(
        "scaled RoPE, no pad token, two end tokens, a date in the template",
        LlamaConfig,
        llama_tokenizer,
        ("<|eot_id|>", "<|end_of_text|>"),
        {"rope_parameters": LLAMA_ROPE},
    ),
    "Qwen3": Family(
        "norms of queries and keys; `enable_thinking=True`, fixed",
        Qwen3Config,
        qwen3_tokenizer,
        ("<|im_end|>", "<|endoftext|>"),
        {},
    ),
    "Gemma 3": Family(
        "sliding windows, four norms a layer, BPE with byte fallback, a BOS in the template",
        Gemma3TextConfig,
        gemma_tokenizer,
        ("<end_of_turn>", "<eos>"),
        {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "SmolLM2": Family(
        "grouped queries, digits one by one, pad and end token the same",
        LlamaConfig,
        smollm_tokenizer,
        ("<|im_end|>",),
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
    ),
}


def save_family(name: str, folder: Path, *, seed: int) -> None:
    """A model of the family with random weights, its generation config and its tokenizer."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    config = family.config(
        **{**SMALL, **family.settings},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
