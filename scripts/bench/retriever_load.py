"""Closed-loop load on a retrieval server: many clients that each wait for their answer before they ask again.

The clients speak HTTP/1.1 over bare sockets on uvloop (about 30 microseconds a request), so that the server rather
than they are measured.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import orjson

Requests = Iterator[tuple[tuple[int, ...], bytes]]  # endless (numbers of the queries, bytes of the request)
# Called with query numbers, status (0: the connection broke) and body
AnswerObserver = Callable[[tuple[int, ...], int, bytes], None]
PAUSE_S = 0.05  # after an answer that is an error


@dataclass
class LoadResult:
    """What one server did under one load. Throughput counts what was answered between warm-up and end."""

    seconds: float = 0.0
    num_answered: int = 0  # queries answered within `seconds`
    num_errors: int = 0  # requests with another status than 200, or none
    # One of every request sent after the warm-up, also of those answered after the end
    latencies_s: list[float] = field(default_factory=list)
    # Query numbers and body of the answers kept for checking
    answers: list[tuple[tuple[int, ...], bytes]] = field(default_factory=list)


class _Run:
    """The state that all clients of one run share."""

    def __init__(self, requests: Requests, *, num_kept: int, on_answer: AnswerObserver | None) -> None:
        self.requests, self.num_kept, self.on_answer = requests, num_kept, on_answer
        self.result = LoadResult()
        self.measuring = self.stopping = False
        self.num_open = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, numbers: tuple[int, ...], status: int, body: bytes, sent: float, *, measured: bool) -> None:
        result = self.result
        if self.on_answer:
            self.on_answer(numbers, status, body)
        if status != 200:
            result.num_errors += 1
            return
        if measured:
            result.latencies_s.append(time.perf_counter() - sent)
        if self.measuring and not self.stopping:
            result.num_answered += len(numbers)
        if len(result.answers) < self.num_kept:
            result.answers.append((numbers, body))

    def closed(self) -> None:
        self.num_open -= 1
        if self.num_open == 0 and not self.done.done():
            self.done.set_result(None)


class _Client(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._buffer = bytearray()
        self._waiting = False
        self._numbers: tuple[int, ...] = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def connection_lost(self, _: Exception | None) -> None:
        if self._waiting:
            self._run.answered(self._numbers, 0, b"", self._sent, measured=self._measured)
        self._run.closed()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        head_end = buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(buffer[:head_end]).lower()
        start = head.index(b"content-length:") + 15
        length = int(head[start:].split(b"\r\n", 1)[0])
        if len(buffer) < head_end + 4 + length:
            return
        self._waiting = False
        body = bytes(buffer[head_end + 4 : head_end + 4 + length])
        status = int(head[9:12])
        self._run.answered(self._numbers, status, body, self._sent, measured=self._measured)
        buffer.clear()
        if status == 200:
            self._ask()
        else:
            asyncio.get_running_loop().call_later(PAUSE_S, self._ask)

    def _ask(self) -> None:
        if self._run.stopping:
            self._transport.close()
            return
        self._numbers, request = next(self._run.requests)
        self._sent, self._measured, self._waiting = time.perf_counter(), self._run.measuring, True
        self._transport.write(request)


def http_request(url: str, queries: list[str], *, topk: int = 3, return_scores: bool = True) -> bytes:
    body = orjson.dumps({"queries": queries, "topk": topk, "return_scores": return_scores})
    head = f"POST /retrieve HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def run_load(
    url: str,
    requests: Requests,
    *,
    num_clients: int,
    warm_up_s: float,
    seconds: float,
    num_kept: int = 256,
    on_start: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
    on_answer: AnswerObserver | None = None,
) -> LoadResult:
    """Loads `url` with `num_clients` connections, and waits until the last request is answered.

    Args:
        num_kept: answers kept for checking.
        on_start, on_end: called where the measured time begins and ends.
    """
    loop = asyncio.get_running_loop()
    run = _Run(requests, num_kept=num_kept, on_answer=on_answer)
    address = urlsplit(url)
    run.num_open = num_clients
    for _ in range(num_clients):
        await loop.create_connection(lambda: _Client(run), address.hostname or "127.0.0.1", address.port or 80)
    await asyncio.sleep(warm_up_s)
    on_start()
    run.measuring, started = True, time.perf_counter()
    await asyncio.sleep(seconds)
    run.stopping = True
    run.result.seconds = time.perf_counter() - started
    on_end()
    await run.done
    return run.result
