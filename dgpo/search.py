"""Asynchronous client of the retrieval server: one connection pool, timeouts, jittered retries."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.error
import urllib.request
from typing import Any

import aiohttp

RETRYABLE_STATUS = {429, 500, 502, 503, 504}
MAX_RETRY_AFTER_S = 30.0


class SearchFailedError(RuntimeError):
    """A search got no answer after all retries."""


class RetrieverUnavailableError(RuntimeError):
    """No healthy retrieval server at the URL."""


class SearchClient:
    """`POST {url}/retrieve`, or `{url}/corpora/{corpus}/retrieve` for a named corpus."""

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
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        """The top documents, best first.

        Raises:
            SearchFailedError: no answer after `max_retries` retries, or the server refuses the request.
        """
        path = f"/corpora/{corpus}/retrieve" if corpus else "/retrieve"
        body = {"queries": [query], "topk": topk, "return_scores": True}
        for attempt in range(self.max_retries + 1):
            wait_s = random.uniform(0.5, 1.0) * self.backoff_s * 2**attempt
            try:
                async with self._client().post(self.url + path, json=body) as response:
                    if response.status == 200:
                        result = (await response.json())["result"][0]
                        return [entry["document"] for entry in result]
                    reason = f"HTTP {response.status}: {(await response.text())[:200]}"
                    if response.status not in RETRYABLE_STATUS:
                        break
                    wait_s = max(wait_s, _retry_after_s(response.headers.get("Retry-After")))
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.max_retries:
                self.num_retries += 1
                await asyncio.sleep(wait_s)
        self.num_failed += 1
        raise SearchFailedError(f"search at {self.url}{path} failed after {attempt + 1} attempts: {reason}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self.max_concurrency)
            self._session = aiohttp.ClientSession(timeout=self.timeout, connector=connector)
        return self._session


def _retry_after_s(header: str | None) -> float:
    try:
        return min(float(header or 0.0), MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0  # an HTTP date: our own back-off decides


def check_health(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """What `{url}/health` says.

    Raises:
        RetrieverUnavailableError: with the command that starts a server.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout_s) as response:
            return json.loads(response.read())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RetrieverUnavailableError(
            f"no retrieval server answers at {url} ({error}): start one with `python -m retriever.serve`, or set "
            "retriever.url"
        ) from None
