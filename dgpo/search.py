"""Asynchronous client of the retrieval server: one connection pool, timeouts, jittered retries."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp

MAX_BACKOFF_S = 10.0
MAX_RETRY_AFTER_S = 30.0  # a server that asks for more is treated as asking for this much


class SearchFailedError(RuntimeError):
    """A search got no answer after all retries: the server is down or overloaded."""


class SearchRefusedError(ValueError):
    """The server will not answer such requests, however often they are sent: a mistake in the set-up."""


class RetrieverUnavailableError(RuntimeError):
    """No healthy retrieval server at the URL."""


class SearchClient:
    """A search function over HTTP. Use as `async with SearchClient(...) as client`, in one event loop.

    Args:
        url: of the server; `/retrieve`, or `/corpora/{corpus}/retrieve` for a named corpus, is appended.
        timeout_s: of one attempt, from the moment it is sent: waiting for a free slot does not count.
        max_retries: further attempts after the first.
        max_concurrency: requests in flight.
        backoff_s: the first wait between attempts; it doubles, and is shortened at random so that clients spread out.

    Attributes:
        num_retries, num_failed: attempts beyond the first, and searches given up, since the client was made.
    """

    def __init__(
        self, url: str, *, timeout_s: float, max_retries: int, max_concurrency: int, backoff_s: float = 0.2
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout = aiohttp.ClientTimeout(total=timeout_s)
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.backoff_s = backoff_s
        self.num_retries = 0
        self.num_failed = 0
        # Not the connector's own limit: its queue would count towards the timeout of every request that waits in it.
        self._slots = asyncio.Semaphore(max_concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. A later search opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        """The `topk` best documents `{"id", "contents"}`, best first.

        Connection errors, timeouts, HTTP 429 and 5xx are tried again; a `Retry-After` in seconds is honoured.

        Raises:
            SearchFailedError: no answer after `max_retries` retries.
            SearchRefusedError: another status, or an answer in another format. Not retried.
        """
        url = f"{self.url}/corpora/{quote(corpus, safe='')}/retrieve" if corpus else f"{self.url}/retrieve"
        body = {"queries": [query], "topk": topk, "return_scores": True}
        attempt = 0
        while True:
            retry_after_s = 0.0
            try:
                status, headers, text = await self._post(url, body)
            except (TimeoutError, aiohttp.ClientError) as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                if status == 200:
                    return _documents(text, url)
                reason = f"HTTP {status} {text[:200]}".strip()
                if status != 429 and status < 500:
                    raise SearchRefusedError(
                        f"{url} refuses the search ({reason}): check retriever.url, the corpus and the server's limits"
                    )
                retry_after_s = _retry_after_s(headers.get("Retry-After"))
            if attempt == self.max_retries:
                self.num_failed += 1
                raise SearchFailedError(f"search at {url} failed after {attempt + 1} attempts, the last with {reason}")
            self.num_retries += 1
            backoff_s = min(self.backoff_s * 2**attempt, MAX_BACKOFF_S)
            await asyncio.sleep(max(retry_after_s, random.uniform(0.5, 1.0) * backoff_s))
            attempt += 1

    async def _post(self, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], str]:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self.max_concurrency)
            self._session = aiohttp.ClientSession(timeout=self.timeout, connector=connector)
        async with self._slots, self._session.post(url, json=body) as response:
            return response.status, response.headers, await response.text(errors="replace")


def check_health(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """What `{url}/health` says. Synchronous: for checks at start-up.

    Raises:
        RetrieverUnavailableError: nothing healthy answers there; names the command that starts a server.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout_s) as response:
            return json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RetrieverUnavailableError(
            f"no retrieval server answers at {url} ({error}): start one with `python -m retriever.serve`, or set "
            "retriever.url"
        ) from error


def _documents(text: str, url: str) -> list[dict[str, Any]]:
    """The documents in an answer to one query."""
    try:
        (entries,) = json.loads(text)["result"]
        documents = [entry["document"] for entry in entries]
        well_formed = all(isinstance(document["contents"], str) for document in documents)
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise SearchRefusedError(
            f"{url} answers {text[:200]!r}: check retriever.url, expected the format "
            '{"result": [[{"document": {"id", "contents"}, "score"}, ..]]}'
        )
    return documents


def _retry_after_s(header: str | None) -> float:
    try:
        return min(max(float(header or 0.0), 0.0), MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0  # an HTTP date: our own back-off decides
