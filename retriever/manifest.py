"""What an index folder says about itself, and the check that its parts belong together.

A folder holds `corpus.jsonl`, `corpus.offsets.npy`, the index (`<encoder>_Flat.index`, or `bm25/`) and `manifest.json`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from retriever.encoders import EncoderConfig
from retriever.errors import IndexFolderError

Method = Literal["dense", "bm25"]

FORMAT = 1
MANIFEST_FILE = "manifest.json"
CORPUS_FILE = "corpus.jsonl"
OFFSETS_FILE = "corpus.offsets.npy"
# Above this a start-up would wait for the hash; the offset table still notices another size.
MAX_BYTES_HASHED_AT_LOAD = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written last by the builder, read first by the server."""

    method: Method
    index: str
    """The index's file or folder, relative to the manifest."""
    num_passages: int
    corpus_sha256: str
    corpus_bytes: int
    encoder: EncoderConfig | None = None
    dimension: int | None = None
    num_truncated_passages: int = 0
    """Passages of this build (over all corpora built together) that were cut to the encoder's limit."""
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an index folder; raises `IndexFolderError` when it is absent or of another kind."""
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise IndexFolderError(
            f"{folder} is not an index folder (no {MANIFEST_FILE}); "
            f"make one: python -m retriever.build --corpus <corpus.jsonl> --out {folder}"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.get("format") != FORMAT or content["method"] not in get_args(Method):
            raise ValueError(f"format {content.get('format')!r}, method {content.get('method')!r}")
        encoder = content.pop("encoder")
        return Manifest(encoder=EncoderConfig(**encoder) if encoder else None, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFolderError(
            f"{path} cannot be read by this version ({error}; expected format {FORMAT}); build it again"
        ) from None


def check_corpus(folder: Path, manifest: Manifest, num_passages: int, *, verify: bool) -> None:
    """Raise `IndexFolderError` unless the folder's corpus is the one that was indexed.

    The hash is compared for corpora up to 1 GiB, and for larger ones when `verify` is set.
    """
    path = folder / CORPUS_FILE
    if num_passages != manifest.num_passages:
        raise IndexFolderError(
            f"{path} has {num_passages} passages, the index was built from {manifest.num_passages}; build it again"
        )
    small = path.stat().st_size <= MAX_BYTES_HASHED_AT_LOAD
    if (small or verify) and (seen := sha256_of(path)) != manifest.corpus_sha256:
        raise IndexFolderError(
            f"{path} has sha256 {seen[:12]}.., the index was built from {manifest.corpus_sha256[:12]}..: "
            "the corpus changed; build it again"
        )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
