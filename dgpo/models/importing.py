"""A checkpoint of veRL or Search-R1 as a Hugging Face folder, to use as student, teacher, or in evaluation.

python -m dgpo import checkpoint=verl_checkpoints/nq-ppo/global_step_300 out=models/teacher
python -m dgpo import checkpoint=.. out=.. dtype=bfloat16 base=Qwen/Qwen2.5-3B-Instruct

veRL's are folders of FSDP shards with a `huggingface/` beside them; Search-R1's, and veRL's `huggingface/` where it
holds weights, are model folders already, which get safetensors, a tokenizer and our generation config.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.errors import ConfigError, DataError
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import writing
from dgpo.runs.replacing import check_target

OPTIONS = ("checkpoint", "out", "dtype", "base", "trust_remote_code")
DTYPES = ("float32", "bfloat16", "float16")


def import_checkpoint(arguments: Sequence[str]) -> Path:
    """Writes the model folder `out`.

    Args:
        arguments: `checkpoint=` and `out=`; `dtype=` of the weights (as they are); `base=`, a model whose configuration
            and tokenizer are taken where the checkpoint brings none; `trust_remote_code=true`.

    Raises:
        ConfigError: no such checkpoint, a critic's, an incomplete one, or one of another model than its configuration;
            or `out` exists.
    """
    options = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown or not {"checkpoint", "out"} <= options.keys():
        raise ConfigError(
            f"import takes checkpoint=FOLDER out=FOLDER, and {', '.join(f'{name}=' for name in OPTIONS[2:])}"
            + (f"; not {unknown[0]}=" if unknown else "")
        )
    dtype, out = options.get("dtype"), Path(options["out"])
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}, or none to keep what the weights have")
    check_target(out, key="out", stage="import", replace=False, inputs=[options["checkpoint"]])
    trusted = options.get("trust_remote_code", "false").lower() == "true"
    folder = find_model(Path(options["checkpoint"]))
    model, source = (
        _from_shards(folder, dtype, options.get("base"), trusted)
        if has_shards(folder)
        else _from_model_folder(folder, dtype, trusted)
    )
    from transformers import AutoTokenizer

    from dgpo.models.model_folders import save_model_folder

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.get("base") or source, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} has no tokenizer: name a model that has it, base=PATH ({error})") from None
    with writing(out) as target:
        save_model_folder(model, tokenizer, target)
        write_manifest(
            target,
            stage="import",
            inputs={"checkpoint": str(folder), "base": options.get("base")},
            config=dict(options),
            counts={"parameters": sum(parameter.numel() for parameter in model.parameters())},
            seed=0,
        )
    print(f"imported {folder} as {out}; next: train.init={out}, or test.models.NAME={out}", file=sys.stderr)
    return out


def has_shards(folder: Path) -> bool:
    """Whether the folder holds FSDP shards of a model."""
    return any(folder.glob("model_world_size_*_rank_*.pt"))


def find_model(path: Path) -> Path:
    """The folder of the policy's weights: `path` itself, or `actor` below a step's folder.

    Raises:
        ConfigError: it holds no model, several steps, another format, or a critic.
    """
    if not path.is_dir():
        raise ConfigError(f"checkpoint={path}: no such folder")
    steps = sorted(path.glob("global_step_*"), key=lambda step: step.name)
    if steps and not has_shards(path):
        raise ConfigError(f"checkpoint={path} holds {len(steps)} checkpoints: name one of them, such as {steps[-1]}")
    folder = path / "actor" if (path / "actor").is_dir() else path
    if (folder / "dist_ckpt").is_dir() or (folder / "model" / "dist_ckpt").is_dir():
        raise ConfigError(
            f"checkpoint={folder} is Megatron's: merge it with `python -m verl.model_merger merge --backend megatron` "
            "first, then import the folder that makes"
        )
    config = folder / "huggingface" / "config.json" if has_shards(folder) else folder / "config.json"
    architectures = (json.loads(config.read_text()).get("architectures") if config.is_file() else None) or []
    if folder.name == "critic" or any("ForTokenClassification" in name for name in architectures):
        raise ConfigError(
            f"checkpoint={folder} is a critic (its output is a value and not a token): import the actor beside it, "
            f"{folder.parent / 'actor'}"
        )
    if not has_shards(folder) and not config.is_file():
        raise ConfigError(
            f"checkpoint={folder}: expected FSDP shards (model_world_size_N_rank_K.pt) or a model folder "
            "(config.json), found neither"
        )
    return folder


def _from_shards(folder: Path, dtype: str | None, base: str | None, trusted: bool) -> tuple[Any, str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dgpo.models.lora import merge_adapters
    from dgpo.models.shards import load_shards, shard_paths, whole_tensors

    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # no process group is needed to read
    source = base or str(folder / "huggingface")
    if base is None and not (folder / "huggingface" / "config.json").is_file():
        raise ConfigError(f"{folder}/huggingface has no config.json: name the model that was trained, base=PATH")
    try:
        shards = load_shards(shard_paths(folder))
        merged = merge_adapters(dict(whole_tensors(shards)), folder)
    except DataError as error:
        raise ConfigError(str(error)) from None
    state = {name: tensor.to(getattr(torch, dtype)) if dtype else tensor for name, tensor in merged.items()}
    config = AutoConfig.from_pretrained(source, trust_remote_code=trusted)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    _check_names(model, state, source=source, folder=folder)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = next(iter(state.values())).dtype
    return model, source


def _check_names(model: Any, state: Mapping[str, Any], *, source: str, folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    wrong = [
        *(f"{name} is missing" for name in expected if name not in state and name not in tied),
        *(f"{name} is not in the model" for name in state if name not in expected),
        *(
            f"{name} has the shape {tuple(state[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ),
    ]
    if wrong:
        critic = any(name.startswith(("score.", "v_head.")) for name in state)
        hint = (
            "this is a critic: import the actor beside it" if critic else "name the model that was trained, base=PATH"
        )
        raise ConfigError(
            f"{folder} is of another model than {source}/config.json describes: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + f"; {hint}"
        )


def _from_model_folder(folder: Path, dtype: str | None, trusted: bool) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    from dgpo.config.model_files import check_model_folder
    from dgpo.models.model_folders import weights_dtype

    check_model_folder(str(folder), key="checkpoint")
    own = weights_dtype(folder) if any(folder.glob("*.safetensors")) else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or own, trust_remote_code=trusted)
    return model, str(folder)
