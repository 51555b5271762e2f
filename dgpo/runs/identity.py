"""What weights, question files and a retriever are, by content: what results belong to, and what a run may go on with.

Large files are read once. Their checksums are remembered in the user's cache folder by path, size, inode and both
times of the file: a copy that restores the modification time cannot restore the time of its status change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dgpo.agent.search import check_health, read_token, split_urls
from dgpo.config.schema import RetrieverConfig
from dgpo.errors import DataError
from dgpo.files import atomic_write_text, file_sha256
from dgpo.runs.artifacts import MANIFEST

# Beside the weights, what decides which tokens a model reads and writes.
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that a folder has
NUM_HASHING_THREADS = 8
REMEMBERED_BYTES = 1_000_000  # smaller files are read again
MAX_REMEMBERED = 2000  # files
SETTLED_NS = 2_000_000_000  # a file that changed so recently may change again within the resolution of its times
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_identity(path: str) -> str:
    """One checksum of a model's weights, configuration and tokenizer, whatever the folder is called.

    Args:
        path: a Hugging Face folder, or a hub name, whose files are fetched where they are not in the cache yet.

    Raises:
        DataError: a manifest seals the folder, and a file is not what it says.
    """
    folder = Path(path) if Path(path).is_dir() else _snapshot(path)
    names = _model_files(folder)
    digests = dict(zip(names, _digests([folder / name for name in names]), strict=True))
    manifest, sealed = _seal(folder)
    for name, expected in sealed.items():
        if name in digests and digests[name] != expected:
            raise DataError(
                f"{folder / name} has changed since {manifest} was written (SHA-256 {digests[name][:12]}.., expected "
                f"{expected[:12]}..): restore it, or copy the folder to another place, without that manifest"
            )
    return _sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def file_identity(path: str | Path) -> str:
    """SHA-256 of a file."""
    return _digests([Path(path)])[0]


def retriever_identity(retriever: RetrieverConfig, rows: Iterable[Mapping[str, Any]]) -> Any:
    """What the searches of these questions find things in.

    Returns:
        The corpora with the checksums that the server tells, wherever it runs; the URL of a server that does not tell;
        a backend's name and options. What a backend reads is not looked into.

    Raises:
        ConfigError: no server answers.
    """
    if retriever.backend:
        return {"backend": retriever.backend, "options": dict(retriever.backend_options)}
    told = check_health(retriever.url, token=read_token(retriever.token_file))
    served, default = told.get("corpora", {}), told.get("default")
    searched = sorted({row["extra_info"].get("corpus") or default or "" for row in rows} or set(served))
    found = {name: served.get(name) or {} for name in searched}
    if found and all("corpus_sha256" in corpus for corpus in found.values()):
        return found
    return {"url": sorted(split_urls(retriever.url)), "corpora": searched}


def _model_files(folder: Path) -> list[str]:
    weights = next((found for pattern in WEIGHTS if (found := list(folder.glob(pattern)))), [])
    others = [path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.name != MANIFEST]
    return sorted(path.name for path in (*weights, *others))


def _snapshot(name: str) -> Path:
    """The folder of a hub model in the cache, complete where the hub can be reached."""
    from huggingface_hub import snapshot_download

    for weights in WEIGHTS:
        folder = Path(snapshot_download(name, allow_patterns=[*MODEL_FILES, weights]))
        if any(folder.glob(weights)):
            break
    return folder


def _seal(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The manifest in or above a folder that lists its files, and their checksums; of a result or of a checkpoint."""
    folder = folder.absolute()
    for above in (folder, *folder.parents[:3]):
        path = above / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            listed = manifest.get("sha256") or {name: file["sha256"] for name, file in manifest["files"].items()}
            names = {name: (above / name).relative_to(folder) for name in listed if (above / name).parent == folder}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # none, or another program's
        if names:
            return path, {str(names[name]): listed[name] for name in names}
    return None, {}


def _digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, from memory where it is the one that was read before."""
    remembered = _recall()
    resolved = [path.resolve() for path in paths]
    found = {path: _known(path, remembered) for path in resolved}
    unknown = [path for path, digest in found.items() if digest is None]
    marks = {path: _mark(path) for path in unknown}  # taken before reading: what changes meanwhile is read again
    with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
        found |= dict(zip(unknown, pool.map(file_sha256, unknown), strict=True))
    large = {path: mark for path, mark in marks.items() if mark["size"] >= REMEMBERED_BYTES and _settled(mark)}
    if large:
        _remember(remembered | {str(path): {**mark, "sha256": found[path]} for path, mark in large.items()})
    return [str(found[path]) for path in resolved]


def _known(path: Path, remembered: Mapping[str, Any]) -> str | None:
    if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
        return path.name  # the hub's cache names large files by their content
    entry = remembered.get(str(path))
    return entry["sha256"] if entry and _mark(path) | {"sha256": entry["sha256"]} == entry else None


def _mark(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _settled(mark: Mapping[str, int]) -> bool:
    return time.time_ns() - max(mark["mtime_ns"], mark["ctime_ns"]) > SETTLED_NS


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgpo" / "checksums.json"


def _recall() -> dict[str, Any]:
    try:
        remembered = json.loads(_memory().read_text())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: there is no home
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _remember(entries: Mapping[str, Any]) -> None:
    """For the next start; without a folder to write to, that one reads the files again."""
    newest = dict(list(entries.items())[-MAX_REMEMBERED:])
    try:
        atomic_write_text(_memory(), json.dumps(newest, indent=1) + "\n")
    except (OSError, RuntimeError):
        return


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
