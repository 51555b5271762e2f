"""The shape of a causal language model (Llama, Qwen2, Qwen3, Mistral, Gemma 3), and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dgpo.config.model_files import HubUnreachableError, model_file, read_json
from dgpo.config.schema import Config
from dgpo.config.stages import is_planned
from dgpo.errors import ConfigError
from dgpo.hardware.known_models import KNOWN_MODELS

FAMILY = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")


@dataclass(frozen=True)
class ModelShape:
    """Sizes in values, as in `config.json`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # the output matrix is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma 3
    norms: int = 2  # per layer; Gemma 3 also normalises what attention and MLP return

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output matrix."""
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer: four projections of attention, three of the MLP, norms."""
        attention = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        bias = (self.query_size + 2 * self.kv_size) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return attention + bias + 3 * self.hidden * self.intermediate + self.norms * self.hidden

    @property
    def body(self) -> int:
        """Parameters without the output matrix: embedding, layers, final norm."""
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def parameters(self) -> int:
        return self.body + (0 if self.tied else self.embedding)

    @property
    def critic(self) -> int:
        """Parameters of a value model made from it: the body, and a head with one output and a bias."""
        return self.body + self.hidden + 1

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the decoder: rank times the widths on both sides."""
        attention = 2 * (self.hidden + self.query_size) + 2 * (self.hidden + self.kv_size)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied by in a forward pass: all but the embedding's look-up."""
        return self.layers * self.layer + self.hidden + self.embedding


def shape_from_config(settings: Mapping[str, Any]) -> ModelShape | None:
    """From a `config.json`; None for a model of another family, or a file that does not say enough."""
    kind = settings.get("model_type")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    given = [settings.get(name) for name in needed] + [
        settings.get(name) or 1 for name in ("num_key_value_heads", "head_dim")
    ]
    if kind not in FAMILY or not all(isinstance(size, int) and size > 0 for size in given):
        return None
    heads = settings["num_attention_heads"]
    return ModelShape(
        hidden=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        intermediate=settings["intermediate_size"],
        vocab=settings["vocab_size"],
        tied=bool(settings.get("tie_word_embeddings", kind == "gemma3_text")),
        qkv_bias=kind == "qwen2" or bool(settings.get("attention_bias", False)),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        norms=4 if kind == "gemma3_text" else 2,
    )


def find_shape(config: Config, path: str | None) -> ModelShape | None:
    """The shape of the model at `path`, which may be a folder, a hub name, or what an earlier stage will write.

    A hub model whose config.json cannot be read is looked up by its name in `known_models`. None: it is not known.
    """
    if not path:
        return None
    if Path(path).is_dir():
        file = model_file(path, "config.json", key="model")
        return shape_from_config(read_json(file, f"model={path}")) if file else None
    if path == config.teacher.path and config.teacher.init and Path(path).name == "model":
        return find_shape(config, config.teacher.init)
    written = is_planned(config, path) or Path(path).parts[-2:] in (("distill", "model"), ("train", "model"))
    if written and path != config.student.path:
        return find_shape(config, config.student.path)
    return _hub_shape(path)


@cache
def _hub_shape(name: str) -> ModelShape | None:
    try:
        file = model_file(name, "config.json", key="model")
    except HubUnreachableError:
        return known_shape(name)
    except ConfigError:
        return None  # no model at all: the checks have said so, or it is not theirs to say
    return shape_from_config(read_json(file, f"model={name}")) if file else None


def known_shape(name: str) -> ModelShape | None:
    """By the architecture that a hub name contains: `me/SearchR1-qwen2.5-3b-instruct` is `qwen2.5-3b`."""
    found = [known for known in KNOWN_MODELS if f"{known}-" in f"{name.lower().rsplit('/', 1)[-1]}-"]
    return shape_from_config(KNOWN_MODELS[found[0]]) if found else None
