"""Make an index folder of another type from vectors that exist: no encoder runs, and neither index is held in memory.

The published index of Search-R1 as it is (linked, not copied), in 16 bits, and as a graph over 8 bits:
python -m retriever.convert --index e5_Flat.index --corpus wiki-18.jsonl.gz --out indexes/wiki \\
    --encoder intfloat/e5-base-v2 --preset e5
python -m retriever.convert --index indexes/wiki --to SQfp16 --out indexes/wiki-fp16
python -m retriever.convert --index indexes/wiki --to HNSW32_SQ8 --search-params efSearch=256 --out indexes/wiki-hnsw
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from retriever.build import add_encoder_arguments, encoder_config, write_dense
from retriever.collection import open_corpus
from retriever.command import Parser, run, whole_number
from retriever.corpus import Corpus, read_offsets
from retriever.encoder_config import EncoderConfig, resolve_config
from retriever.encoding import Progress, ProgressPrinter
from retriever.errors import RetrieverError
from retriever.faiss_file import (
    GRAPH_SEARCH_PARAMS,
    ROW_DTYPES,
    ReadRows,
    file_type,
    make_index,
    open_rows,
    read_header,
)
from retriever.manifest import CORPUS_FILE, OFFSETS_FILE, read_manifest
from retriever.options import MAX_THREADS
from retriever.work_folder import import_once, link_or_copy, work_folder


def convert_folder(
    source: Path,
    out: Path,
    *,
    index_type: str | None = None,
    search_params: str = "",
    num_threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Makes `out` from the index folder `source`, which must hold plain rows (`Flat` or `SQfp16`).

    The corpus is shared by a hard link where the file system can.

    Args:
        index_type: FAISS's factory string; None = that of `source`.
        search_params: FAISS's notation, recorded for searching; empty = `default_search_params`.

    Raises:
        RetrieverError: `source` is of another type, `out` may not be replaced, or FAISS refuses the index type.
    """
    manifest = read_manifest(source)
    index_type = index_type or manifest.index_type
    if manifest.index_type not in ROW_DTYPES or manifest.encoder is None:
        raise RetrieverError(
            f"{source} is a {manifest.index_type} index, which does not hold the vectors; "
            f"convert from {' or '.join(ROW_DTYPES)}"
        )
    open_corpus(source, manifest)
    plan = {"convert": str(source), "to": index_type}
    with work_folder(out.parent, [out.name], plan, overwrite=overwrite, inputs=[source]) as work:
        folder = work.path / out.name
        folder.mkdir(exist_ok=True)
        for name in (CORPUS_FILE, OFFSETS_FILE):
            link_or_copy(source / name, folder / name)
        corpus = Corpus(folder / CORPUS_FILE, read_offsets(folder / OFFSETS_FILE, folder / CORPUS_FILE))
        _write(
            folder,
            corpus,
            source / manifest.index,
            manifest.index_type,
            open_rows(source / manifest.index, manifest.index_type),
            index_type=index_type,
            search_params=search_params,
            encoder=manifest.encoder,
            num_truncated_passages=manifest.num_truncated_passages,
            num_threads=num_threads,
            progress=progress,
        )
        work.publish(out.name, out)


def convert_file(
    index: Path,
    corpus: Path,
    out: Path,
    encoder: EncoderConfig,
    *,
    from_type: str | None = None,
    index_type: str | None = None,
    search_params: str = "",
    num_threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Makes `out` from a FAISS file that someone else wrote, and its corpus.

    Args:
        from_type: what the file must be; None = what its header says.
        index_type: FAISS's factory string; None = the file's, which is linked, or copied, as it is.
        search_params: FAISS's notation, recorded for searching; empty = the file's own, of one that is converted
            `default_search_params`.

    Raises:
        RetrieverError: the two have different numbers of rows, or the file cannot become that, before anything is
            converted.
    """
    config = resolve_config(encoder)
    if not index.is_file():
        raise RetrieverError(f"{index} does not exist; give a FAISS file, or an index folder")
    kind = file_type(index)
    if from_type not in (None, kind):
        raise RetrieverError(f"{index} is a {kind} index, not {from_type} as --from-type says; leave it out")
    index_type = index_type or kind
    if index_type != kind and kind not in ROW_DTYPES:
        raise RetrieverError(
            f"{index} is a {kind} index, which does not hold the vectors as they were; leave out --to to take it as it "
            f"is, or convert from {' or '.join(ROW_DTYPES)}"
        )
    read_rows = open_rows(index, kind)  # refuses a file that is cut off
    num_rows = read_header(index).num_rows
    plan = {"convert": str(index), "corpus": str(corpus), "to": index_type, "encoder": asdict(config)}
    with work_folder(out.parent, [out.name], plan, overwrite=overwrite, inputs=[index, corpus]) as work:
        imported = import_once([corpus], work.path / out.name)
        if len(imported) != num_rows:
            raise RetrieverError(
                f"{index} holds {num_rows} vectors, {corpus} has {len(imported)} passages: they do not belong "
                "together; take the corpus that the index was built from"
            )
        _write(
            work.path / out.name,
            imported,
            index,
            kind,
            read_rows,
            index_type=index_type,
            search_params=search_params,
            encoder=config,
            num_threads=num_threads,
            progress=progress,
        )
        work.publish(out.name, out)


def _write(
    folder: Path,
    corpus: Corpus,
    source: Path,
    source_type: str,
    read_rows: ReadRows,
    *,
    index_type: str,
    search_params: str,
    encoder: EncoderConfig,
    num_threads: int,
    num_truncated_passages: int = 0,
    progress: Progress | None = None,
) -> None:
    import faiss

    faiss.omp_set_num_threads(num_threads)
    dimension = read_header(source).dimension
    if source_type != index_type or search_params:
        make_index(index_type, dimension, search_params)
    if progress:
        progress(0, len(corpus))
    write_dense(
        folder,
        corpus,
        read_rows,
        dimension=dimension,
        index_type=index_type,
        search_params=search_params,
        encoder=encoder,
        num_truncated_passages=num_truncated_passages,
        existing=source if source_type == index_type else None,
        progress=progress,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("convert", __doc__)
    parser.add_argument("--index", required=True, type=Path, help="an index folder, or a FAISS file")
    parser.add_argument("--out", required=True, type=Path, help="index folder to make")
    parser.add_argument(
        "--to", help="FAISS factory string: Flat, SQfp16, SQ8, HNSW32_SQ8, .. (default: what the vectors are in now)"
    )
    parser.add_argument(
        "--search-params",
        default="",
        help=f"recorded for searching, e.g. efSearch=256 or nprobe=32 (default: of HNSW {GRAPH_SEARCH_PARAMS}; of a "
        "file that is taken as it is: its own)",
    )
    parser.add_argument(
        "--num-threads",
        type=whole_number(1, MAX_THREADS),
        default=1,
        help="of training and adding (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder when it is an index")
    file = parser.add_argument_group("a FAISS file of someone else's (a folder knows these)")
    file.add_argument("--corpus", type=Path, help="what it was built from: .jsonl, .jsonl.gz or .parquet")
    file.add_argument("--from-type", choices=list(ROW_DTYPES), help="what it must be (default: what its header says)")
    add_encoder_arguments(parser)
    options = parser.parse_args(arguments)
    run("convert", lambda: _convert(options))


def _convert(options: argparse.Namespace) -> None:
    started, out = time.perf_counter(), options.out.resolve()
    common = {
        "index_type": options.to,
        "search_params": options.search_params,
        "num_threads": options.num_threads,
        "overwrite": options.overwrite,
        "progress": ProgressPrinter("converted"),
    }
    if options.index.is_dir():
        convert_folder(options.index, out, **common)
    elif options.corpus is None:
        raise RetrieverError(f"{options.index} is no index folder; a FAISS file needs --corpus and an encoder")
    else:
        config = encoder_config(options)
        convert_file(options.index, options.corpus, out, config, from_type=options.from_type, **common)
    print(f"{options.out}: ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
