"""Hugging Face folders of search agents: weights, tokenizer, and a generation config that says how they decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import STOP_STRINGS
from dgpo.config.model_files import safetensors_header
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text, share_as_umask_says

GENERATION_CONFIG = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_generation_config(folder: Path, *, fallback: dict[str, Any] | None = None) -> None:
    """Greedy decoding, the model's own tokens, and the strings at which a turn ends.

    What a base model brings besides goes: Qwen2.5's penalty for repetition and its top-k, for example, are of a chat
    model, and change what the trained policy says.

    Args:
        fallback: where to find the tokens that the folder's own generation config does not name, such as its
            `config.json`.
    """
    path = folder / GENERATION_CONFIG
    own = json.loads(path.read_text()) if path.exists() else {}
    tokens = {name: own.get(name, (fallback or {}).get(name)) for name in _TOKENS}
    settings = {
        **{name: value for name, value in tokens.items() if value is not None},
        "do_sample": False,
        "stop_strings": list(STOP_STRINGS),
        **({"transformers_version": own["transformers_version"]} if "transformers_version" in own else {}),
    }
    atomic_write_text(path, json.dumps(settings, indent=2) + "\n")


def weights_dtype(folder: Path) -> str:
    """`float32`, `bfloat16` or `float16`: of the first tensor in the folder's safetensors.

    Not what `config.json` says: veRL writes float32 weights beside a configuration that says bfloat16, by which
    transformers would cast them.

    Raises:
        ConfigError: the file has no such header.
    """
    file = sorted(folder.glob("*.safetensors"))[0]
    header = safetensors_header(file)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    dtype = next(iter(header[1].values()))["dtype"] if header and header[1] else None
    if dtype not in names:
        raise ConfigError(f"{file} has no weights of {', '.join(names.values())}: copy or save the checkpoint again")
    return names[dtype]


def write_dtype(folder: Path) -> None:
    """Makes `config.json` say what the weights are, so that they are loaded as they are."""
    path = folder / "config.json"
    atomic_write_text(
        path, json.dumps({**json.loads(path.read_text()), "dtype": weights_dtype(folder)}, indent=2) + "\n"
    )


def save_model_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights as safetensors, configuration, tokenizer with chat template, generation config."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_generation_config(folder, fallback=model.config.to_dict())
    share_as_umask_says(folder)
