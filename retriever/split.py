"""Split an index folder into shards, for an index that one machine cannot hold.

python -m retriever.split --index indexes/wiki --out indexes/wiki-shards --shards 4

Writes OUT/0 .. OUT/3, each an index folder of consecutive passages, in constant memory. `retriever.deploy --shards`
serves them as one; for another index type, run retriever.convert on each.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retriever.build import write_dense
from retriever.collection import open_corpus
from retriever.corpus import Corpus, write_offsets
from retriever.errors import IndexFolderError
from retriever.faiss_file import ROW_DTYPES, row_reader
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE, Manifest, read_manifest

COPY_BYTES = 1 << 24


def split_folder(folder: Path, out: Path, num_shards: int) -> list[Path]:
    """Write `num_shards` index folders below `out` and return them, in the order of their passages.

    Raises `IndexFolderError` for an index whose rows cannot be told apart, and for folders that exist.
    """
    manifest = read_manifest(folder)
    if manifest.index_type not in ROW_DTYPES or manifest.encoder is None:
        raise IndexFolderError(
            f"{folder} is a {manifest.index_type} index; expected {' or '.join(ROW_DTYPES)}, whose rows lie one after "
            "the other: split that one, and convert the shards with python -m retriever.convert"
        )
    corpus = open_corpus(folder, manifest)
    if not 2 <= num_shards <= len(corpus):
        raise IndexFolderError(f"--shards {num_shards}: expected 2 to {len(corpus)}, the number of passages")
    borders = np.linspace(0, len(corpus), num_shards + 1).astype(int).tolist()
    targets = [out / str(number) for number in range(num_shards)]
    for target in targets:
        if target.exists():
            raise IndexFolderError(f"{target} exists; choose another folder")
    for target, start, end in zip(targets, borders[:-1], borders[1:], strict=True):
        _write_shard(folder, manifest, corpus, target, start, end)
    return targets


def _write_shard(folder: Path, manifest: Manifest, corpus: Corpus, target: Path, start: int, end: int) -> None:
    """Passages `[start, end)` as a folder of their own, which appears when it is complete."""
    assert manifest.encoder is not None
    assert manifest.dimension is not None
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    offsets = np.array(corpus.offsets[start : end + 1])
    _copy_bytes(corpus.path, partial / CORPUS_FILE, int(offsets[0]), int(offsets[-1]))
    write_offsets(partial / OFFSETS_FILE, offsets - offsets[0])
    read_rows = row_reader(folder / manifest.index, manifest.index_type)
    write_dense(
        partial,
        Corpus(partial / CORPUS_FILE, offsets - offsets[0]),
        lambda first, last: read_rows(start + first, start + last),
        dimension=manifest.dimension,
        index_type=manifest.index_type,
        search_params=manifest.search_params,
        encoder=manifest.encoder,
        num_truncated_passages=manifest.num_truncated_passages,
    )
    partial.rename(target)


def _copy_bytes(source: Path, target: Path, start: int, end: int) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        reader.seek(start)
        while start < end:
            start += writer.write(reader.read(min(COPY_BYTES, end - start)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m retriever.split", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True, help="a Flat or SQfp16 index folder")
    parser.add_argument("--out", type=Path, required=True, help="the shards appear below it")
    parser.add_argument("--shards", type=int, required=True, help="their number")
    options = parser.parse_args(arguments)
    try:
        for target in split_folder(options.index, options.out, options.shards):
            print(target)
    except (ValueError, OSError) as error:
        sys.exit(f"retriever.split: {error}")


if __name__ == "__main__":
    main()
