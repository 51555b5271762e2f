"""What an index folder says about itself, and the check that its parts are the ones that were built.

A folder holds `corpus.jsonl`, `corpus.offsets.npy` (a cache), the index (`<encoder>_<type>.index`, or `bm25/`),
`probe.npy` (vectors of a few passages) and `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retriever.encoder_config import EncoderConfig
from retriever.errors import RetrieverError

Method = Literal["dense", "bm25"]

FORMAT = 2
MANIFEST_FILE = "manifest.json"
CORPUS_FILE = "corpus.jsonl"
OFFSETS_FILE = "corpus.offsets.npy"
PROBE_FILE = "probe.npy"
RECALL_FILE = "recall.json"  # written by retriever.recall
BM25_TYPE = "BM25"
NUM_PROBES = 16
MAX_MANIFEST_BYTES = 1 << 24
# A seal samples this many blocks, spread evenly, the first and the last included: milliseconds for 64 GB.
NUM_SAMPLE_BLOCKS, SAMPLE_BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What identifies a file: its size and a hash of samples at each start, the whole hash when asked."""

    bytes: int
    sample_sha256: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written last by the builder, read first by the server."""

    index: str  # the index's file or folder, relative to the manifest
    index_type: str  # `BM25`, or a FAISS factory string: `Flat` (float32), `SQfp16`, `SQ8`, `HNSW32_SQ8`, ..
    num_passages: int
    files: Mapping[str, Seal]  # seals by file name, relative to the manifest
    search_params: str = ""  # FAISS's notation, such as `efSearch=128`; empty: as the index file has it
    encoder: EncoderConfig | None = None
    dimension: int | None = None
    # Whether all vectors were seen to be finite when the folder was made; where not, they are looked at on loading
    is_finite: bool = False
    # Passages of this build (over all corpora built together) that were cut to the encoder's limit
    num_truncated_passages: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def method(self) -> Method:
        return "bm25" if self.index_type == BM25_TYPE else "dense"

    @property
    def corpus_sha256(self) -> str:
        return self.files[CORPUS_FILE].sha256

    def is_sealed(self, name: str) -> bool:
        """Whether a file, or something in a folder, of this name is among the files."""
        return any(file == name or file.startswith(f"{name}/") for file in self.files)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an index folder; raises `RetrieverError` when it is absent or of another kind."""
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        way_out = f"python -m retriever.build --corpus CORPUS.jsonl --out {folder}"
        if os.path.lexists(folder):  # somebody's: it is no place for an index
            way_out = "python -m retriever.build --corpus CORPUS.jsonl --out NEW_FOLDER"
        if Path(folder).is_file():
            way_out = f"python -m retriever.convert --index {folder} --corpus CORPUS.jsonl --out NEW_FOLDER ..."
        raise RetrieverError(f"{folder} is not an index folder (no {MANIFEST_FILE}); make one: {way_out}")
    try:
        if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size} bytes")
        content: dict[str, Any] = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r}")
        encoder = content.pop("encoder")
        files = {name: Seal(**seal) for name, seal in content.pop("files").items()}
        manifest = Manifest(encoder=EncoderConfig(**encoder) if encoder else None, files=files, **content)
        if manifest.method == "dense" and (manifest.encoder is None or manifest.dimension is None):
            raise ValueError("a dense index without encoder or dimension")
        if outside := [name for name in [*files, manifest.index] if not _is_inside(name)]:
            raise ValueError(f"it names {outside[0]!r}, outside its folder")
        if CORPUS_FILE not in files:
            raise ValueError(f"no {CORPUS_FILE} among its files")
        if not manifest.is_sealed(manifest.index):
            raise ValueError(f"{manifest.index!r}, its index, is not among its files")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RetrieverError(
            f"{path} cannot be read by this version ({error}; expected format {FORMAT}); build it again"
        ) from None


def foreign_content(folder: Path) -> str | None:
    """Why a folder is not an index folder and nothing else, whatever its version; None where it is."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return f"it has no {MANIFEST_FILE} of an index"
    if not isinstance(content, dict) or not {"index", "num_passages", "files"} <= content.keys():
        return f"its {MANIFEST_FILE} is not that of an index"
    own = {MANIFEST_FILE, OFFSETS_FILE, RECALL_FILE, *content["files"]}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (path.is_symlink() or not path.is_dir()) and name not in own:
            return f"it holds {name}, which is no part of the index"
    return None


def check_files(folder: Path, manifest: Manifest, *, verify: bool = False) -> None:
    """Raises `RetrieverError` unless the files of a folder are those that the manifest was written for.

    Sizes and samples are compared, which takes milliseconds; with `verify` every byte is, a minute per 64 GB or more.
    """
    for name, seal in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise RetrieverError(f"{folder} lacks {name}, which its manifest promises; copy it again or build it again")
        if (size := path.stat().st_size) != seal.bytes:
            raise RetrieverError(
                f"{path} has {size} bytes, the manifest was written for {seal.bytes}: it is cut off or was changed; "
                "copy it again, or build it again"
            )
        changed = sample_sha256(path) != seal.sample_sha256
        if changed or (verify and sha256_of(path) != seal.sha256):
            raise RetrieverError(
                f"{path} is not the file that the manifest was written for (another sha256): it was changed after the "
                "index was built; copy it again, or build it again"
            )


def seal_files(folder: Path) -> dict[str, Seal]:
    """Seals of all files of a folder but the manifest and the offset table, which can be made again."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: seal_file(folder / name) for name in names if name not in (MANIFEST_FILE, OFFSETS_FILE)}


def seal_file(path: Path) -> Seal:
    return Seal(bytes=path.stat().st_size, sample_sha256=sample_sha256(path), sha256=sha256_of(path))


def sample_sha256(path: Path) -> str:
    """Hash of blocks spread evenly over a file; of the whole file when it is small."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as file:
        if size <= NUM_SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES:
            digest.update(file.readall())
        else:
            for number in range(NUM_SAMPLE_BLOCKS):
                file.seek((size - SAMPLE_BLOCK_BYTES) * number // (NUM_SAMPLE_BLOCKS - 1))
                digest.update(file.read(SAMPLE_BLOCK_BYTES))
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe_rows(num_passages: int, num_probes: int) -> list[int]:
    """Rows whose vectors a server compares with its encoder: spread, so that a shifted corpus shows too."""
    return np.linspace(0, num_passages - 1, min(num_probes, num_passages)).astype(int).tolist()


def _is_inside(name: str) -> bool:
    """A manifest may come from someone else: it must not name files outside its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
