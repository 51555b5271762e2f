"""The hub of tests/e2e/local_hub.py, made once: kept between sessions of pytest while nothing that made it has changed.

What made it is every file of this checkout that the making imported, the configuration's files, and the versions of the
packages behind it, each by its digest; the folder's name is the digest of them all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE_OF = "made_of.json"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def digest_of(name: str) -> str | None:
    """SHA-256 of a file of this checkout, by its path in it; the version of a package; None: there is none."""
    if name.startswith("package "):
        package = name.removeprefix("package ")
        return platform.python_version() if package == "python" else version(package)
    path = ROOT / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def current_sources() -> dict[str, str | None]:
    """What this process has imported of the checkout up to now, and what it was configured by."""
    files = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    names = {str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT) and ".venv" not in file.parts}
    names |= {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    names |= {f"package {name}" for name in ("python", *PACKAGES)}
    return {name: digest_of(name) for name in sorted(names)}


def is_current(folder: Path) -> bool:
    sources: Mapping[str, str] = json.loads((folder / MADE_OF).read_text())["sources"]
    return all(digest_of(name) == digest for name, digest in sources.items())


def provide(cache: Path, make: Callable[[Path], None]) -> Path:
    """The hub's folder below `cache`, as it is found there or as `make` writes it, whole or not at all.

    Args:
        cache: holds hubs of this checkout; those that are out of date go when a new one has come.
        make: writes a hub and its record, `MADE_OF`, into the folder it is given.
    """
    kept = sorted(cache.glob("hub-*"))
    for folder in kept:
        if is_current(folder):
            return folder
    work = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        make(work)
        name = hashlib.sha256(json.dumps(json.loads((work / MADE_OF).read_text())["sources"]).encode()).hexdigest()
        made = cache / f"hub-{name[:16]}"
        try:
            work.rename(made)
        except OSError:  # another session has made the same one meanwhile
            if not made.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for folder in kept:
        shutil.rmtree(folder, ignore_errors=True)
    return made
