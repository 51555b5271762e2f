"""Asynchronous client of one or more retrieval servers: balancing, failover, timeouts, jittered retries."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import random
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp

from dgpo.agent.shared_requests import SharedRequests
from dgpo.errors import ConfigError, DgpoError

MAX_BACKOFF_S = 10.0
MAX_RETRY_AFTER_S = 30.0  # a server that asks for more is treated as asking for this much
CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 30.0  # a first search may wait for what the server loads
FIRST_LEFT_OUT_S = 1.0  # how long a failed server is left out; doubles with every failure in a row
MAX_LEFT_OUT_S = 30.0
GONE = (502, 503, 504)  # answers of a proxy whose server is gone or not ready yet

logger = logging.getLogger(__name__)


class SearchFailedError(DgpoError):
    """A search got no answer after all retries: the server is down or overloaded."""


class SearchRefusedError(ConfigError):
    """The server will not answer such requests, however often they are sent: a mistake in the set-up."""


@dataclass(eq=False)
class _Replica:
    """One server: what is in flight to it, and until when it is left out after a fault."""

    url: str
    in_flight: int = 0
    num_faults: int = 0  # in a row
    out_until: float = 0.0  # on the loop's clock

    def usable(self, now: float) -> bool:
        """Not left out; one that comes back is first tried with a single search."""
        return self.out_until <= now and (self.num_faults == 0 or self.in_flight == 0)

    def leave_out(self, now: float, seconds: float | None) -> None:
        """For `seconds`, else for longer with each fault in a row; faults of what was in flight together are one."""
        if seconds is not None:
            self.out_until = max(self.out_until, now + seconds)
        elif self.out_until <= now:
            self.out_until = now + min(FIRST_LEFT_OUT_S * 2**self.num_faults, MAX_LEFT_OUT_S)
            self.num_faults += 1


class SearchClient:
    """A search function over HTTP. Use as `async with SearchClient(...) as client`, in one event loop.

    Searches go to the server with the fewest in flight. One that fails is left out for a while, and its searches are
    tried at once elsewhere; when it answers again it takes its share.

    Args:
        url: of the server, or of several that serve the same, separated by commas; `/retrieve`, or
            `/corpora/{corpus}/retrieve` for a named corpus, is appended.
        timeout_s: of one attempt, from the moment it is sent: waiting for a free slot does not count.
        max_retries: further attempts after the first, over all servers.
        max_outage_s: how long a search goes on trying while no server can be reached; those attempts do not count as
            retries. 0: they do.
        max_concurrency: requests in flight, over all servers.
        max_queries_per_request: searches that wait at the same time share requests of at most so many. A request is
            answered and tried again as a whole; before one is given up, though servers answer, each of its queries is
            asked by itself.
        backoff_s: the first wait between attempts; it doubles, and is shortened at random so that clients spread out.
        token: sent as `Authorization: Bearer`.

    Attributes:
        num_retries, num_failed: requests beyond a search's first, and searches given up, since the client was made.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_retries: int,
        max_concurrency: int,
        max_queries_per_request: int,
        max_outage_s: float = 0.0,
        backoff_s: float = 0.2,
        token: str | None = None,
    ) -> None:
        # A host that is gone takes no part of the time that a search may take.
        self.timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.max_outage_s = max_outage_s
        self.backoff_s = backoff_s
        self.num_retries = 0
        self.num_failed = 0
        self._replicas = [_Replica(one) for one in split_urls(url)]
        self._headers = _authorization(token)
        # Not a limit of the connector: its queue would count towards the timeout of every request that waits in it.
        self._shared = SharedRequests(
            self._retrieve_together, max_concurrency=max_concurrency, max_queries=max_queries_per_request
        )
        self._session: aiohttp.ClientSession | None = None
        self._in_outage = self._has_split = False

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels all searches and closes the connections. A later search opens new ones."""
        await self._shared.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        """The `topk` best documents `{"id", "contents"}`, best first.

        Connection errors, timeouts, HTTP 429 and 5xx are tried again, on another server if there is one; a
        `Retry-After` in seconds is honoured.

        Raises:
            SearchFailedError: no answer after `max_retries` retries, nor after `max_outage_s` of servers that are gone.
            SearchRefusedError: another status, or an answer in another format. Tried again only by itself, where it
                shared its request.
        """
        return await self._shared.search(query, topk=topk, corpus=corpus)

    async def _retrieve_together(
        self, queries: list[str], topk: int, corpus: str | None, began: float
    ) -> Sequence[list[dict[str, Any]] | Exception]:
        """The outcome of each query: what one of them does to a server is not the others' fault."""
        try:
            return await self.retrieve(queries, topk, corpus, began=began)
        except (SearchFailedError, SearchRefusedError) as error:
            if len(queries) == 1 or self._in_outage:
                outcomes: list[Any] = [type(error)(*error.args) for _ in queries]
            else:
                self.num_retries += len(queries)
                self._report_split(error)
                one_by_one = [self.retrieve([query], topk, corpus, began=began) for query in queries]
                answers = await asyncio.gather(*one_by_one, return_exceptions=True)
                outcomes = [each if isinstance(each, BaseException) else each[0] for each in answers]
        self.num_failed += sum(isinstance(outcome, SearchFailedError) for outcome in outcomes)
        return outcomes

    async def retrieve(
        self, queries: list[str], topk: int, corpus: str | None, *, began: float | None = None
    ) -> list[list[dict[str, Any]]]:
        """The documents for each query, by one request now; attempts and errors as in `search`.

        Args:
            began: when waiting for them began, on the loop's clock: an outage may last `max_outage_s` from then on.
        """
        path = f"corpora/{quote(corpus, safe='')}/retrieve" if corpus else "retrieve"
        body = {"queries": queries, "topk": topk, "return_scores": True}
        clock = asyncio.get_running_loop().time
        began = clock() if began is None else began
        num_attempts = num_counted = num_waits = 0
        while True:
            replica = self._choose(clock())
            url = f"{replica.url}/{path}"
            retry_after_s: float | None = None
            try:
                status, headers, text = await self._post(replica, url, body)
            except (TimeoutError, aiohttp.ClientError) as error:
                reason = f"{type(error).__name__} {error}".strip()
                gone = isinstance(error, aiohttp.ClientConnectionError)
            else:
                if status == 200:
                    self._in_outage = False
                    replica.num_faults, replica.out_until = 0, 0.0
                    return _documents(text, url, len(queries))
                reason = f"HTTP {status} {text[:200]}".strip()
                if status != 429 and status < 500:
                    raise SearchRefusedError(
                        f"{url} refuses the search ({reason}): check retriever.url, the corpus, and the server's "
                        "limits and token"
                    )
                gone = status in GONE
                retry_after_s = _retry_after_s(headers.get("Retry-After"))
            replica.leave_out(clock(), retry_after_s)
            num_attempts += 1
            others = [other for other in self._replicas if other is not replica and other.usable(clock())]
            in_outage = gone and all(other.num_faults for other in others)
            if in_outage and clock() - began < self.max_outage_s:
                self._report_outage(reason)
            elif num_counted == self.max_retries:
                raise SearchFailedError(
                    f"{len(queries)} searches at {url} failed after {num_attempts} attempts, the last with {reason}"
                )
            else:
                num_counted += 1
            self.num_retries += 1
            if not others:
                backoff_s = min(self.backoff_s * 2**num_waits, MAX_BACKOFF_S)
                num_waits += 1
                await asyncio.sleep(max(retry_after_s or 0.0, random.uniform(0.5, 1.0) * backoff_s))

    def _report_split(self, error: Exception) -> None:
        if not self._has_split:
            self._has_split = True
            logger.warning(
                "%s: its searches are sent again one by one; for a server that takes only one query at a time set "
                "retriever.max_queries_per_request=1",
                error,
            )

    def _report_outage(self, reason: str) -> None:
        if not self._in_outage:
            self._in_outage = True
            logger.warning("no retrieval server can be reached (%s): searches wait %g s", reason, self.max_outage_s)

    def _choose(self, now: float) -> _Replica:
        """The server with the fewest requests in flight; of those left out, the one that comes back first."""
        usable = [replica for replica in self._replicas if replica.usable(now)]
        if not usable:
            return min(self._replicas, key=lambda replica: replica.out_until)
        fewest = min(replica.in_flight for replica in usable)
        return random.choice([replica for replica in usable if replica.in_flight == fewest])

    async def _post(self, replica: _Replica, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], str]:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(timeout=self.timeout, connector=connector, headers=self._headers)
        replica.in_flight += 1
        try:
            async with self._session.post(url, json=body) as response:
                return response.status, response.headers, await response.text(errors="replace")
        finally:
            replica.in_flight -= 1


def split_urls(url: str) -> list[str]:
    """The servers of `retriever.url`; raises `ConfigError` when it names none."""
    urls = [one.strip().rstrip("/") for one in url.split(",") if one.strip()]
    if not urls or not all(is_address(one) for one in urls):
        raise ConfigError(f"retriever.url is {url!r}; expected http://host:port, or several separated by commas")
    return urls


def is_address(url: str) -> bool:
    """Whether it is `http://host`, with or without port and path."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are no address
        return False


def read_token(path: str | None, *, key: str = "retriever.token_file") -> str | None:
    """The token in the file that `key` names, or None; raises `ConfigError` for a file without one."""
    if path is None:
        return None
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:  # ValueError: no text
        raise ConfigError(f"{key}={path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not token:
        raise ConfigError(f"{key}={path} is empty; expected the server's token")
    return token


def check_health(url: str, timeout_s: float = 5.0, *, token: str | None = None) -> dict[str, Any]:
    """Checks every server of `url` and returns what they serve. Synchronous: for checks at start-up.

    Returns:
        the corpora that every server has, under `corpora`, and the first one's `default` where it names it; nothing
        where a server of the same protocol answers `/health` but does not tell.

    Raises:
        ConfigError: a server does not answer or is not ready; names the way out.
    """
    served = [_check_one(one, timeout_s, token) for one in split_urls(url)]
    told = [info["corpora"] for info in served if "corpora" in info]
    if len(told) < len(served):
        return {}
    corpora = {name: corpus for name, corpus in told[0].items() if all(name in other for other in told)}
    return {"corpora": corpora, **{key: value for key, value in served[0].items() if key == "default"}}


def _check_one(url: str, timeout_s: float, token: str | None) -> dict[str, Any]:
    """What one server says of itself: the content of `/info`, or nothing where it has none."""
    status, health = _ask(url, "health", timeout_s, token)
    if status == 404:  # a server of the same protocol that has nothing but searches, as Search-R1's own
        _probe(url, token)
        return {}
    if status != 200:
        raise ConfigError(f"{url} answers /health with HTTP {status}: check retriever.url")
    status, ready = _ask(url, "ready", timeout_s, token)
    if status == 503:
        detail = _content(ready).get("detail")
        raise ConfigError(f"{url} is not ready ({detail}): wait until {url}/ready says so")
    status, info = _ask(url, "info", timeout_s, token)
    if status == 401:
        raise ConfigError(f"{url} wants its token: set retriever.token_file to a file that holds it")
    return _content(info if status == 200 else health)


def _probe(url: str, token: str | None) -> None:
    """A search of one query; raises `ConfigError` unless it is answered in our protocol."""
    body = {"queries": ["a"], "topk": 1, "return_scores": True}
    status, text = _ask(url, "retrieve", PROBE_TIMEOUT_S, token, body)
    if status != 200:
        raise ConfigError(
            f"{url} has no /health, and answers a search with HTTP {status} {text[:200]!r}: check retriever.url"
        )
    try:
        _documents(text, f"{url}/retrieve", 1)
    except SearchRefusedError as error:
        raise ConfigError(f"{url} has no /health, and is no retrieval server: {error}") from None


def open_direct(request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
    """Opens a URL of this machine or this cluster, as searches do: whatever proxy the environment names."""
    response: http.client.HTTPResponse = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=timeout_s
    )
    return response


def _ask(
    url: str, path: str, timeout_s: float, token: str | None, body: Mapping[str, Any] | None = None
) -> tuple[int, str]:
    """Status and text of an answer; a request with a body is a POST."""
    data = None if body is None else json.dumps(body).encode()
    headers = _authorization(token) | ({"Content-Type": "application/json"} if data else {})
    try:
        with open_direct(urllib.request.Request(f"{url}/{path}", data, headers), timeout_s) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConfigError(
            f"no retrieval server answers at {url} ({error}): start one with `python -m retriever.serve`, or set "
            "retriever.url"
        ) from error


def _content(text: str) -> dict[str, Any]:
    """The JSON object in an answer; an empty one where it is something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _authorization(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _documents(text: str, url: str, num_queries: int) -> list[list[dict[str, Any]]]:
    """The documents in an answer, for each query."""
    try:
        answers = [[entry["document"] for entry in entries] for entries in json.loads(text)["result"]]
        contents = [document["contents"] for documents in answers for document in documents]
        well_formed = len(answers) == num_queries and all(isinstance(each, str) for each in contents)
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise SearchRefusedError(
            f"{url} answers {num_queries} queries with {text[:200]!r}: check retriever.url, expected the format "
            '{"result": [[{"document": {"id", "contents"}, "score"}, ..], ..]} with a list for each query; '
            "retriever.max_queries_per_request=1 is for servers that take one at a time"
        )
    return answers


def _retry_after_s(header: str | None) -> float | None:
    """Seconds, bounded; None for no header or an HTTP date: then our own back-off decides."""
    try:
        return None if header is None else min(max(float(header), 0.0), MAX_RETRY_AFTER_S)
    except ValueError:
        return None
