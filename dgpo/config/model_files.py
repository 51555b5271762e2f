"""What the files of a Hugging Face model say, read without transformers: enough to compare two models in a second."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dgpo.errors import ConfigError, first_line


class HubUnreachableError(ConfigError):
    """A hub model is not in the cache and the hub does not answer."""


MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
PROBE_S = 5.0
# What is read of a model's files, by its kind; null is as good as absent.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "max_position_embeddings": int,
    "text_config": dict,
    "model": dict,
    "added_tokens": list,
    "chat_template": (str, list),
    "eos_token": (str, dict),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(path: str) -> bool:
    """Whether a model is named as on the hub, owner/name, and no folder."""
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).is_dir() and not Path(path.split("/")[0]).is_dir()


def model_file(path: str, name: str, *, key: str) -> Path | None:
    """The file `name` of the model at `path` (a folder, or a hub name: fetched or from the cache); None if it has none.

    Raises:
        ConfigError: no such folder or hub model; `key` is the config key to name.
        HubUnreachableError: a hub name, but there is no hub to ask.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not is_hub_name(path):
        raise ConfigError(f"{key}={path}: no such folder; expected a Hugging Face model folder or a hub name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if cached := cached_file(path, name):
        return cached
    try:
        return Path(hf_hub_download(path, name, local_files_only=not hub_answers()))
    except LocalEntryNotFoundError:
        if cached_file(path, "config.json"):  # its other files came with that one, as far as it has them
            return None
        raise HubUnreachableError(
            f"{key}={path}: neither a folder nor in the cache, and the hub cannot be reached; fetch it where there "
            "is a network (`dgpo download download.what=[models]`, docs/offline.md), or set a folder"
        ) from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(f"{key}={path}: the hub refuses it ({reason}); check the name and your login") from None


def cached_file(repo: str, name: str) -> Path | None:
    """The file of a hub model as the cache has it; None where it has not, or knows that there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None


@cache
def hub_answers() -> bool:
    """Whether there is a hub to ask: asked once, and briefly, where the library would try for 20 seconds a file."""
    import httpx
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=PROBE_S)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError):  # the latter of proxies: nonsense, SOCKS
        return False
    return True


def use_cache_alone() -> None:
    """Tells the hub's library, here and in processes that start from here, not to ask for what is cached."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def check_model_folder(path: str | None, *, key: str) -> None:
    """Raises `ConfigError` unless `path` names a model: a folder with config.json and weights, or a hub name."""
    if not path:
        raise ConfigError(f"{key} is not set: name a Hugging Face model folder or a hub model")
    file = model_file(path, "config.json", key=key)
    if file is None:
        if any(Path(path).glob("**/model_world_size_*_rank_0.pt")):
            raise ConfigError(
                f"{key}={path} is a checkpoint of FSDP shards: make a model folder of it with "
                f"`python -m dgpo import checkpoint={path} out=FOLDER`, and name that"
            )
        raise ConfigError(f"{key}={path}: no config.json there; expected a Hugging Face model folder")
    read_json(file, f"{key}={path}")
    if is_hub_name(path) and not hub_answers():
        use_cache_alone()
    folder = Path(path)
    if folder.is_dir() and not _weight_files(folder):
        raise ConfigError(
            f"{key}={path}: no *.safetensors or pytorch_model*.bin weights there; save the model with save_pretrained"
        )
    for index in folder.glob("*.index.json"):
        names = _indexed(index)
        if names is None or any(not name or Path(name).name != name for name in names):
            raise ConfigError(
                f"{key}={path}: {index.name} names other things than weight files in this folder; copy or save the "
                "checkpoint again"
            )
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ConfigError(
                f"{key}={path}: {index.name} names {missing[0]}, which is not there ({len(missing)} of {len(names)} "
                "files are missing); copy or save the checkpoint again"
            )
    for file in folder.glob("*.safetensors"):
        header = safetensors_header(file)
        expected = None if header is None or not _fits(header[1]) else _expected_size(*header)
        if expected is None or file.stat().st_size < expected:
            wanted = "no header of tensors" if expected is None else f"expected {expected} or more"
            raise ConfigError(
                f"{key}={path}: {file.name} is no whole file of weights ({file.stat().st_size} bytes, {wanted}); copy "
                "or save the checkpoint again"
            )


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]] | None:
    """Bytes before the first tensor, and name -> dtype, shape and place; None where there is no header.

    The first 8 bytes may claim any length: no more is read than the file and the format's own limit allow.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    if not isinstance(header, dict):
        return None
    header.pop("__metadata__", None)
    complete = all(
        isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys() for entry in header.values()
    )
    return (8 + length, header) if complete else None


def _expected_size(start: int, entries: Mapping[str, Any]) -> int:
    """Bytes of a safetensors file by its own header: up to the first tensor, and the tensors."""
    return start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def _fits(entries: Mapping[str, Any]) -> bool:
    """Whether each tensor's place is as large as its numbers; a type of no whole bytes is not judged."""
    try:
        for entry in entries.values():
            begin, end = entry["data_offsets"]
            bits = int("".join(filter(str.isdigit, entry["dtype"].partition("_")[0])) or 8)  # F32, BF16, F8_E4M3, BOOL
            if bits % 8 == 0 and end - begin != math.prod(entry["shape"]) * bits // 8:
                return False
    except (TypeError, ValueError, AttributeError):  # none of the kinds that the format has
        return False
    return True


def _indexed(index: Path) -> set[str] | None:
    """Files that an index of sharded weights names; None where it is none."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def max_positions(path: str, *, key: str) -> int | None:
    """`max_position_embeddings` in tokens, or None where the configuration has none."""
    file = model_file(path, "config.json", key=key)
    config = read_json(file, f"{key}={path}") if file else {}
    return config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")


def read_json(file: Path, name: str) -> dict[str, Any]:
    """The object in a file of a model.

    Args:
        name: key and path of the model, for the message.

    Raises:
        ConfigError: it holds no JSON object, or a field of another kind than ours read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{name}: {file.name} is no JSON ({error}); copy or save the model again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: {file.name} holds no JSON object; copy or save the model again")
    for field, kind in _KINDS.items():
        value = content.get(field)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{name}: {file.name} says {field}={value!r}, which it cannot be; copy or save the model again"
            )
    return content


def chat_template(path: str, *, key: str) -> str | None:
    """The text of the model's chat template, the one named `default` where it has several; None without one."""
    file = model_file(path, "chat_template.jinja", key=key)
    if file:
        return file.read_text(encoding="utf-8")
    settings_file = model_file(path, "tokenizer_config.json", key=key)
    template = read_json(settings_file, f"{key}={path}").get("chat_template") if settings_file else None
    if isinstance(template, list):
        with _strange_values_told(f"{key}={path}: tokenizer_config.json"):
            template = {each["name"]: each["template"] for each in template}.get("default")
    return template


@contextlib.contextmanager
def _strange_values_told(file: str) -> Iterator[None]:
    """While the values of a file are read: those of another kind than its format has are a `ConfigError`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} holds values that its format does not have ({first_line(error)}); copy or save the model again"
        ) from None


def same_weights(one: str, other: str) -> bool:
    """Whether both are the same model: the same hub name or folder, or folders whose weight files are equal."""
    a, b = Path(one), Path(other)
    if not (a.is_dir() and b.is_dir()):
        return one == other
    if a.resolve() == b.resolve():
        return True
    files_a, files_b = _weight_files(a), _weight_files(b)
    if [file.stat().st_size for file in files_a] != [file.stat().st_size for file in files_b] or not files_a:
        return False
    return all(_digest(x) == _digest(y) for x, y in zip(files_a, files_b, strict=True))


def tokenizer_difference(one: str, other: str, *, keys: tuple[str, str]) -> str | None:
    """How two models' tokenizers differ, in a few words; None where token ids mean the same in both.

    Compares vocabulary with added tokens, merges, splitting rules, end token, and chat template where both have one.
    """
    a, b = (_describe_tokenizer(path, key=key) for path, key in zip((one, other), keys, strict=True))
    for name in a:
        if a[name] != b[name]:
            if name == "vocabulary" and a[name] and b[name]:
                num_differing = sum(
                    a[name].get(token) != b[name].get(token) for token in a[name].keys() | b[name].keys()
                )
                return f"vocabularies of {len(a[name])} and {len(b[name])} tokens, {num_differing} of them different"
            if name == "chat template" and not (a[name] and b[name]):
                continue
            return f"different {name}"
    return None


def _describe_tokenizer(path: str, *, key: str) -> dict[str, Any]:
    file = model_file(path, "tokenizer.json", key=key)
    if file is None:
        raise ConfigError(f"{key}={path}: no tokenizer.json there; save its fast tokenizer beside the weights")
    data = read_json(file, f"{key}={path}")
    with _strange_values_told(f"{key}={path}: tokenizer.json"):
        model = data.get("model") or {}
        vocabulary = model.get("vocab") or {}
        if isinstance(vocabulary, list):  # unigram models: [piece, score]
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        vocabulary = {**vocabulary, **{token["content"]: token["id"] for token in data.get("added_tokens") or []}}
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    settings_file = model_file(path, "tokenizer_config.json", key=key)
    settings = read_json(settings_file, f"{key}={path}") if settings_file else {}
    end = settings.get("eos_token")
    template = chat_template(path, key=key)
    return {
        "vocabulary": vocabulary,
        "merges": merges,
        "splitting rules": (data.get("normalizer"), data.get("pre_tokenizer")),
        "end token": end.get("content") if isinstance(end, dict) else end,
        "chat template": template.strip() if template else None,
    }


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
