"""What the server can be told: the one home of its options and their defaults (those on size are in `limits`)."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from retriever.limits import ServerLimits
from retriever.search_options import SearchOptions

TOKEN_VARIABLE = "RETRIEVER_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    indexes: Mapping[str, Path]
    """Index folders by the name of their corpus."""
    default: str
    """The corpus behind /retrieve."""
    shards: Sequence[str] = ()
    """Servers of the shards of one index, instead of indexes."""
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
    """Options of a command line; raises `ValueError` for indexes, defaults or tokens that cannot be."""
    given = _make_parser(description).parse_args(arguments)
    indexes = _parse_indexes(given.index)
    if bool(indexes) == bool(given.shard):
        raise ValueError("expected either --index (folders to serve) or --shard (servers to ask)")
    default = given.default or next(iter(indexes), "")
    if default not in indexes and not given.shard:
        raise ValueError(f"--default {default!r} is not among the indexes: {', '.join(indexes)}")
    return ServeOptions(
        indexes=indexes,
        default=default,
        shards=tuple(given.shard),
        host=given.host,
        port=given.port,
        port_file=given.port_file,
        num_threads=given.num_threads,
        device=given.device,
        verify=given.verify,
        token=read_token(given.token_file),
        search=SearchOptions(**{choice.name: getattr(given, choice.name) for choice in fields(SearchOptions)}),
        limits=ServerLimits(**{limit.name: getattr(given, limit.name) for limit in fields(ServerLimits)}),
    )


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m retriever.serve", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a folder made by retriever.build; repeat it for several corpora. A bare FOLDER is named after itself",
    )
    parser.add_argument(
        "--shard",
        action="append",
        default=[],
        metavar="URL",
        help="instead of --index: a server of one shard of an index, in order; the answers are merged. The token, if "
        "any, is sent to it too",
    )
    parser.add_argument("--default", metavar="NAME", help="the corpus behind /retrieve (default: the first --index)")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default=ServeOptions.host, help="address to listen on (default: %(default)s, loopback only)"
    )
    network.add_argument(
        "--port", type=int, default=ServeOptions.port, help="0 picks a free one (default: %(default)s)"
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
        type=int,
        default=ServeOptions.num_threads,
        help="of encoder and index; on a machine of its own, give it all cores (default: %(default)s)",
    )
    engine.add_argument(
        "--device", default=ServeOptions.device, help="cpu, cuda or cuda:N; one process per GPU (default: %(default)s)"
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
            raise ValueError(
                f"--index {argument}: the name is {name!r}; expected NAME=FOLDER, the name without slashes"
            )
        if name in folders:
            raise ValueError(f"--index {argument}: the name {name!r} is given twice; give each corpus its own")
        folders[name] = path
    return folders


def read_token(path: Path | None) -> str | None:
    """The token in a file, or in the environment, or None; raises `ValueError` for one that cannot be sent."""
    source = f"--token-file {path}" if path else f"the variable {TOKEN_VARIABLE}"
    try:
        token = path.read_text().strip() if path else os.environ.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read ({error})") from None
    if token is None:
        return None
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise ValueError(f"{source} holds no usable token; expected printable ASCII without spaces")
    return token
