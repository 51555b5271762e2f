"""Serve index folders over HTTP, in Search-R1's protocol.

python -m retriever.serve --index world=indexes/world --index other=indexes/other --default world --port 8000

Asks: POST /retrieve {"queries": ["capital of France"], "topk": 3, "return_scores": true}; GET /health; docs at /docs.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import NoReturn

from retriever.limits import ServerLimits


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m retriever.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--index",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a folder made by retriever.build; repeat it for several corpora. A bare FOLDER is named after itself",
    )
    parser.add_argument("--default", metavar="NAME", help="the corpus behind /retrieve (default: the first --index)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, loopback only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--port-file", type=Path, help="write the port here once requests are answered")
    parser.add_argument("--encoder-threads", type=int, default=1, help="threads of encoder and index (default: 1)")
    parser.add_argument("--device", default="cpu", help="of the encoder: cpu or cuda (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="hash corpora above 1 GiB too before serving")
    for field in fields(ServerLimits):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default, help="limit (default: %(default)s)")
    return parser


def parse_indexes(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` arguments by name; raises `ValueError` for a name given twice."""
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


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is loaded; raises `ValueError` when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0 for a free one"
        ) from None
    return listener


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, _exit_cleanly)
    # Read by OpenMP and the tokenizer when they load, which is below.
    os.environ["OMP_NUM_THREADS"] = str(options.encoder_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _serve(options)
    except ValueError as error:
        sys.exit(f"retriever.serve: {error}")


def _serve(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    folders = parse_indexes(options.index)
    default = options.default or next(iter(folders))
    if default not in folders:
        raise ValueError(f"--default {default!r} is not among the indexes: {', '.join(folders)}")
    limits = ServerLimits(**{field.name: getattr(options, field.name) for field in fields(ServerLimits)})
    listener = listen(options.host, options.port)
    port = listener.getsockname()[1]

    # Loaded here and not above: these take seconds, and --help and mistakes in the arguments should not.
    import uvicorn

    from retriever.collection import load_collection
    from retriever.server import create_app

    collection = load_collection(
        folders, num_threads=options.encoder_threads, device=options.device, verify=options.verify
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if options.port_file:
                _write_port(options.port_file, port)
            num_passages = sum(len(served.corpus) for served in collection.corpora.values())
            print(
                f"retriever: {len(folders)} corpora, {num_passages} passages on http://{options.host}:{port} "
                f"after {time.perf_counter() - started:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    config = uvicorn.Config(
        create_app(collection, default=default, limits=limits),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=limits.drain_s,
        backlog=4096,
    )
    Server(config).run(sockets=[listener])


def _write_port(path: Path, port: int) -> None:
    """Whoever sees the file sees the whole number, and a server that answers."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(f"{port}\n")
    partial.replace(path)


def _exit_cleanly(signal_number: int, frame: FrameType | None) -> NoReturn:
    """While loading, stop at once; while serving, uvicorn drains first and then raises the signal again."""
    sys.exit(0)


if __name__ == "__main__":
    main()
