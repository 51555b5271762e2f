"""Server processes of the retrieval benchmarks."""

import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Target:
    name: str
    url: str
    pid: int | None


def end_servers_on_sigterm() -> None:
    """Lets SIGTERM end the benchmark as Ctrl-C does, with its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))


@contextmanager
def started(name: str, command: Sequence[str], probe: str, log: Path) -> Iterator[Target]:
    """A server process on a free port, once `probe` answers; its log is kept."""
    port = free_port()
    command = [sys.executable, *command, "--port", str(port)]
    print(f"{name}: python {shlex.join(command[1:])}", file=sys.stderr, flush=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(url + probe):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start; see {log}")
            time.sleep(0.2)
        yield Target(name, url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
