"""Shapes of the paper's models and their kin, for planning where their config.json is out of reach.

From the `config.json` of each model on the hub: Qwen/Qwen2.5-{0.5B,1.5B,3B,7B,14B}, meta-llama/Llama-3.2-{1B,3B} and
meta-llama/Llama-3.1-8B; the Instruct models have the same. tests/unit/test_hardware.py compares the parameters that
follow with the published counts.
"""

from __future__ import annotations

from typing import Any

_NAMES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_NAMES, values, strict=True))
    for name, values in {
        "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
        "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True),
        "qwen2.5-3b": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True),
        "qwen2.5-7b": ("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False),
        "qwen2.5-14b": ("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False),
        "llama-3.2-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
        "llama-3.2-3b": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
        "llama-3.1-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    }.items()
}
