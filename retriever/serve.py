"""Serve index folders over HTTP, in Search-R1's protocol.

python -m retriever.serve --index world=indexes/world --index other=indexes/other --default world --port 8000

Ask: POST /retrieve {"queries": ["capital of France"], "topk": 3, "return_scores": true}
See: GET /health (alive), /ready (loaded), /info (what is served), /metrics (Prometheus), /docs (the whole API)
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from retriever.command import run
from retriever.errors import RetrieverError
from retriever.options import ServeOptions, parse_options

if TYPE_CHECKING:
    from retriever.collection import Collection, LoadProgress
    from retriever.service import Service

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they rather than we close them
SWITCH_INTERVAL_S = 0.0005
BACKLOG = 4096
FEW_FILES = 1024


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow is loaded; raises `RetrieverError` when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # until then another server may bind it too
    except OSError as error:
        listener.close()
        raise RetrieverError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0 for a free one"
        ) from None
    return listener


def main(arguments: Sequence[str] | None = None) -> None:
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, _exit_cleanly)
    run("serve", lambda: _serve(parse_options(arguments, description=__doc__ or "")))


def _serve(options: ServeOptions) -> None:
    started = time.perf_counter()
    # Read by OpenMP and the tokenizer when they load, which is below.
    os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a mapped file that is cut short ends the process: not without a word
    _raise_file_limit()
    listener = listen(options.host, options.port)
    port = listener.getsockname()[1]
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
    if options.token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"retriever: anyone who reaches {url} may search; --token-file asks for a token", file=sys.stderr)
    check_folders(options)

    # With --num-threads above 1, threads that spin until the next operation take the event loop's core: 11 queries
    # a second instead of 220. Read when torch and FAISS are loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loaded here and not above: these take a second, and --help and mistakes in the arguments should not.
    import uvicorn

    from retriever.app import create_app

    # The worker comes back from native code many times a batch; at the default of 5 ms it would wait for the loop.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    service = make_service(options)

    class Server(uvicorn.Server):
        announced = False

        async def on_tick(self, counter: int) -> bool:
            if service.ready and not self.announced:
                self.announced = True
                # What the libraries made stays: a full collection, one a second under load, walked it for 90 ms.
                gc.collect()
                gc.freeze()
                if options.port_file:
                    _write_port(options.port_file, port)
                names = ", ".join(service.names)
                seconds = time.perf_counter() - started
                print(f"retriever: {names} on {url} after {seconds:.1f} s", file=sys.stderr, flush=True)
            return await super().on_tick(counter) or service.load_error is not None

    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=options.limits.drain_s,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    Server(config).run(sockets=[listener])
    if service.load_error:
        raise service.load_error


def _raise_file_limit() -> None:
    """A connection is an open file, and the usual soft limit of 1024 is fewer than a training run may bring."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a hard limit that cannot be reached, as some containers have
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        print(f"retriever: only {soft} files, hence connections, may be open at a time (ulimit -n)", file=sys.stderr)


def make_service(options: ServeOptions) -> Service:
    """The service of these options; it starts with the application."""
    from retriever.service import Service

    def load(progress: LoadProgress) -> Collection:
        from retriever.collection import load_collection

        return load_collection(
            options.indexes,
            num_threads=options.num_threads,
            device=options.device,
            verify=options.verify,
            options=options.search,
            progress=progress,
        )

    return Service(
        load, names=list(options.indexes), default=options.default, limits=options.limits, token=options.token
    )


def check_folders(options: ServeOptions) -> None:
    """Raises `RetrieverError` for what can be told before the first library is loaded."""
    from retriever.manifest import read_manifest

    for folder in options.indexes.values():
        read_manifest(folder)


def _write_port(path: os.PathLike[str], port: int) -> None:
    """Whoever sees the file sees the whole number, and a server that answers."""
    partial = f"{os.fspath(path)}.{os.getpid()}"
    with open(partial, "w") as file:
        file.write(f"{port}\n")
    os.replace(partial, path)


def _exit_cleanly(signal_number: int, frame: FrameType | None) -> NoReturn:
    """While starting, stop at once; while serving, uvicorn drains first and then raises the signal again.

    Python is not finalised: under a thread that is still inside a library's loading, that may crash.
    """
    os._exit(0)


if __name__ == "__main__":
    main()
