"""The web as the agent's search, through a SearXNG of yours (or anything that answers as it does).

python -m dgpo ask ask.model=runs/own-docs/distill/model world=own hardware=cpu \\
    retriever.backend=examples.web_search:WebSearch retriever.backend_options.url=http://127.0.0.1:8888

SearXNG answers in JSON where its settings allow it: `search: {formats: [html, json]}`.
"""

from __future__ import annotations

import asyncio
from html import unescape
from typing import Any

import aiohttp

from dgpo.agent.search import SearchFailedError, SearchRefusedError


class WebSearch:
    """Titles and snippets of web pages.

    Args:
        url: of the SearXNG instance.
        language: of the pages.
        retries: after an answer that is none; the wait between them doubles, from half a second.
        timeout_s: of one request.
    """

    def __init__(self, url: str, *, language: str = "en", retries: int = 2, timeout_s: float = 15.0) -> None:
        self.url, self.language, self.retries = url.rstrip("/"), language, retries
        self.timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        """The `topk` first pages that have a snippet; their addresses are the ids.

        Raises:
            SearchFailedError: the instance did not answer, and not after the retries either.
            SearchRefusedError: it does not answer in JSON.
        """
        params = {"q": query, "format": "json", "language": self.language}
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(0.5 * 2 ** (attempt - 1))
            try:
                return _documents(await self._get(params))[:topk]
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise SearchFailedError(f"{self.url} did not answer {self.retries + 1} times ({reason})")

    async def close(self) -> None:
        """Ends the connections."""
        if self._session is not None:
            await self._session.close()

    async def _get(self, params: dict[str, str]) -> Any:
        if self._session is None:  # made in the loop that uses it
            self._session = aiohttp.ClientSession(timeout=self.timeout)
        async with self._session.get(f"{self.url}/search", params=params) as response:
            if response.status == 403:
                raise SearchRefusedError(f"{self.url} refuses JSON: add it to `search.formats` in its settings")
            response.raise_for_status()
            return await response.json()


def _documents(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Results as the episode reads them: a quoted title, a line break, the snippet in one line."""
    found = []
    for result in answer.get("results", []):
        title, text = (" ".join(unescape(result.get(name) or "").split()) for name in ("title", "content"))
        if text:
            found.append({"id": result["url"], "contents": f'"{title}"\n{text}'})
    return found
