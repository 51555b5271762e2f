"""What the server can be told: the one home of its options and their defaults; `retriever.serve` has flags for all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from retriever.command import MAX_INT, Parser, device, whole_number
from retriever.errors import RetrieverError
from retriever.manifest import MANIFEST_FILE

TOKEN_VARIABLE = "RETRIEVER_TOKEN"
DATA_VARIABLE = "RETRIEVER_DATA_PATH"  # the name that the authors' release gave it
MAX_THREADS = 4096

Engine = Literal["auto", "faiss", "faiss-gpu", "torch"]
ScanDtype = Literal["auto", "float32", "bfloat16", "float16"]


def _limit(default: int, meaning: str) -> int:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one request and one server may take."""

    default_topk: int = _limit(3, "passages per query when a request has no topk")
    max_topk: int = _limit(100, "passages per query")
    max_queries: int = _limit(4096, "queries in one request; Search-R1's client sends a whole rollout batch in one")
    max_query_chars: int = _limit(8192, "characters of one query")
    max_body_bytes: int = _limit(16 << 20, "bytes of one request; past it reading stops")
    body_timeout_s: int = _limit(30, "seconds that a request may take to arrive")
    max_waiting_queries: int = _limit(16384, "queries that wait, over all requests; past it a request gets 503")
    retry_after_s: int = _limit(1, "seconds after which a refused request should come back")
    max_batch: int = _limit(256, "queries that are encoded and searched at once")
    cache_mb: int = _limit(128, "memory for answers by (corpus, query, topk); 0 turns the cache off")
    drain_s: int = _limit(10, "seconds that running requests may take to finish after SIGTERM")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), 0 if limit.name == "cache_mb" else 1
            if not least <= value <= MAX_INT:
                raise RetrieverError(f"{limit.name} is {value}; expected at least {least}, at most {MAX_INT}")
        if self.default_topk > self.max_topk:
            raise RetrieverError(f"default_topk is {self.default_topk}, more than max_topk={self.max_topk}: change one")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a server searches."""

    engine: Engine = field(
        default="auto",
        metadata={
            "choices": get_args(Engine),
            "help": "faiss (CPU), faiss-gpu, or torch: exact product in 16 bits, the best rescored in float32; auto is "
            "torch for Flat and SQfp16 indexes on a GPU, else faiss",
        },
    )
    scan_dtype: ScanDtype = field(
        default="auto",
        metadata={
            "choices": get_args(ScanDtype),
            "help": "of the torch engine's copy; auto is float16 on a GPU, bfloat16 on a CPU that multiplies it, else "
            "float32",
        },
    )
    num_candidates: int = field(
        default=16, metadata={"help": "rows scored again in float32, at least; a larger topk takes more"}
    )
    search_params: str = field(
        default="",
        metadata={"help": "FAISS's, such as efSearch=128 (HNSW) or nprobe=32 (IVF), instead of the manifest's"},
    )
    reranker: str = field(
        default="", metadata={"help": "folder or Hugging Face id of a cross-encoder that reorders the candidates"}
    )
    num_reranked: int = field(default=32, metadata={"help": "candidates of each query that the reranker reads"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that a model repository brings; only for models that you trust"}
    )

    def __post_init__(self) -> None:
        for name in ("num_candidates", "num_reranked"):
            if not 1 <= (value := getattr(self, name)) <= MAX_INT:
                raise RetrieverError(f"{name} is {value}; expected at least 1, at most {MAX_INT}")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    indexes: Mapping[str, Path]  # index folders by the name of their corpus
    default: str  # the corpus behind /retrieve
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    num_threads: int = 1
    device: str = "cpu"
    verify: bool = False
    token: str | None = None
    search: SearchOptions = field(default_factory=SearchOptions)
    limits: ServerLimits = field(default_factory=ServerLimits)


def parse_options(arguments: Sequence[str] | None, *, description: str) -> ServeOptions:
    """Options of a command line; raises `RetrieverError` for indexes, defaults or tokens that cannot be."""
    given = _make_parser(description).parse_args(arguments)
    indexes = _parse_indexes(given.index or _indexes_below(os.environ.get(DATA_VARIABLE)))
    default = given.default or next(iter(indexes))
    if default not in indexes:
        raise RetrieverError(f"--default {default!r} is not among the indexes: {', '.join(indexes)}")
    return ServeOptions(
        indexes=indexes,
        default=default,
        host=given.host.removeprefix("[").removesuffix("]"),  # as IPv6 stands in URLs
        port=given.port,
        port_file=_checked_port_file(given.port_file),
        num_threads=given.num_threads,
        device=given.device,
        verify=given.verify,
        token=read_token(given.token_file),
        search=SearchOptions(**{choice.name: getattr(given, choice.name) for choice in fields(SearchOptions)}),
        limits=ServerLimits(**{limit.name: getattr(given, limit.name) for limit in fields(ServerLimits)}),
    )


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser("serve", description)
    parser.add_argument(
        "--index",
        action="append",
        metavar="NAME=FOLDER",
        help="a folder made by retriever.build; repeat it for several corpora. A bare FOLDER is named after itself "
        f"(default: every index folder in ${DATA_VARIABLE})",
    )
    parser.add_argument("--default", metavar="NAME", help="the corpus behind /retrieve (default: the first --index)")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default=ServeOptions.host, help="address to listen on (default: %(default)s, loopback only)"
    )
    network.add_argument(
        "--port",
        type=whole_number(0, 65_535),
        default=ServeOptions.port,
        help="0 picks a free one (default: %(default)s)",
    )
    network.add_argument("--port-file", type=Path, help="write the port here once searches are answered")
    network.add_argument(
        "--token-file",
        type=Path,
        help=f"requests must carry the token in this file; the variable {TOKEN_VARIABLE} may hold it instead",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--num-threads",
        type=whole_number(1, MAX_THREADS),
        default=ServeOptions.num_threads,
        help="of encoder and index; on a machine of its own, give it all cores (default: %(default)s)",
    )
    engine.add_argument(
        "--device",
        type=device,
        default=ServeOptions.device,
        help="cpu, cuda or cuda:N; one process per GPU (default: %(default)s)",
    )
    engine.add_argument(
        "--verify", action="store_true", help="hash every byte of corpora and indexes before serving, not only samples"
    )
    search = parser.add_argument_group("search")
    for choice in fields(SearchOptions):
        flag, meaning = "--" + choice.name.replace("_", "-"), f"{choice.metadata['help']} (default: %(default)s)"
        if isinstance(choice.default, bool):
            search.add_argument(flag, action="store_true", help=choice.metadata["help"])
        else:
            search.add_argument(
                flag,
                type=type(choice.default),
                choices=choice.metadata.get("choices"),
                default=choice.default,
                help=meaning,
            )
    limits = parser.add_argument_group("limits")
    for limit in fields(ServerLimits):
        flag = "--" + limit.name.replace("_", "-")
        meaning = f"{limit.metadata['help']} (default: %(default)s)"
        limits.add_argument(flag, type=int, metavar="N", default=limit.default, help=meaning)
    return parser


def _parse_indexes(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` arguments by name."""
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        path = Path(folder if separator else name)
        name = name if separator else path.name
        if not name or "/" in name:
            raise RetrieverError(
                f"--index {argument}: the name is {name!r}; expected NAME=FOLDER, the name without slashes"
            )
        if name in folders:
            raise RetrieverError(f"--index {argument}: the name {name!r} is given twice; give each corpus its own")
        folders[name] = path
    return folders


def _indexes_below(data: str | None) -> list[str]:
    """Every index folder in `data`, in the order of their names."""
    if not data:
        raise RetrieverError(f"no --index NAME=FOLDER, and {DATA_VARIABLE} is not set: name an index folder")
    folders = sorted(path.parent for path in Path(data).glob(f"*/{MANIFEST_FILE}"))
    if not folders:
        raise RetrieverError(
            f"no --index NAME=FOLDER, and {DATA_VARIABLE}={data} holds no index folder; `python -m retriever.convert` "
            "makes one of a published index, `python -m retriever.build` of a corpus"
        )
    return [str(folder) for folder in folders]


def _checked_port_file(path: Path | None) -> Path | None:
    """Raises `RetrieverError` unless a file with a port can be put there without loss."""
    if path is None:
        return None
    if not path.parent.is_dir():
        raise RetrieverError(f"--port-file {path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not path.read_bytes()[:8].strip().isdigit()):
        raise RetrieverError(f"--port-file {path} exists and holds no port: it is not replaced; choose another file")
    return path


def read_token(path: Path | None) -> str | None:
    """The token in a file, or in the environment, or None; raises `RetrieverError` for one that cannot be sent."""
    source = f"--token-file {path}" if path else f"the variable {TOKEN_VARIABLE}"
    try:
        token = path.read_text().strip() if path else os.environ.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise RetrieverError(f"{source} cannot be read ({error})") from None
    if token is None:
        return None
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise RetrieverError(f"{source} holds no usable token; expected printable ASCII without spaces")
    return token
