"""Search over the shards of an index that one machine cannot hold: ask all of them, keep the best.

Each shard is an ordinary server of a folder that `retriever.split` made. Its scores are those of the whole index, so
the merged answer is the whole index's answer.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import aiohttp
import orjson
from fastapi import Request

from retriever.front import Service
from retriever.limits import ServerLimits
from retriever.protocol import RequestError, RetrieveRequest, parse_request

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 2.0
SHARD_TIMEOUT_S = 60.0
Info = dict[str, Any]
ShardAnswer = list[list[dict[str, Any]]]
"""Per query, `{"document", "score"}`, best first."""


class ShardedService(Service):
    """Forwards each request to every shard and merges the answers; ready while all shards are."""

    def __init__(
        self, urls: Sequence[str], *, limits: ServerLimits, token: str | None = None, shard_token: str | None = None
    ) -> None:
        """`urls` in the order of the shards, which decides between passages of equal score."""
        super().__init__(limits=limits, token=token)
        self.names, self.default = (), ""
        self._urls = [url.rstrip("/") for url in urls]
        self._headers = {"Authorization": f"Bearer {shard_token}"} if shard_token else {}
        self._infos: list[Info | None] = [None] * len(urls)
        self._faults = [f"{url} has not answered yet" for url in self._urls]
        self._mismatch: str | None = None
        self._num_waiting = 0

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=SHARD_TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),  # `max_waiting_queries` bounds what is under way
        )
        self._prober = asyncio.create_task(self._probe())

    async def close(self) -> None:
        self._prober.cancel()
        await self._session.close()

    def progress(self) -> tuple[int, int]:
        return sum(info is not None for info in self._infos), len(self._infos)

    def check_ready(self) -> None:
        detail = self._mismatch
        for info, fault in zip(self._infos, self._faults, strict=True):
            if info is None:
                detail = detail or fault
        if detail:
            raise RequestError(503, detail, self.retry_after())

    async def search(self, request: Request, name: str, body: bytes) -> bytes:
        parsed = parse_request(body, self.limits)
        num_queries = len(parsed.queries)
        if self._num_waiting + num_queries > self.limits.max_waiting_queries:
            detail = f"{self._num_waiting} queries wait; try again in {self.limits.retry_after_s} s"
            raise RequestError(503, detail, self.retry_after())
        self._num_waiting += num_queries
        try:
            asking = asyncio.ensure_future(self._ask_all(name, parsed))
            answers = await self.while_connected(request, asking, num_queries)
        finally:
            self._num_waiting -= num_queries
        self.metrics.queries.inc(num_queries)
        merged = merge(answers, parsed.topk)
        result = merged if parsed.return_scores else [[hit["document"] for hit in hits] for hits in merged]
        return orjson.dumps({"result": result})

    async def _ask_all(self, name: str, parsed: RetrieveRequest) -> list[ShardAnswer]:
        body = orjson.dumps({"queries": parsed.queries, "topk": parsed.topk, "return_scores": True})
        return list(await asyncio.gather(*(self._ask(number, name, body) for number in range(len(self._urls)))))

    async def _ask(self, number: int, name: str, body: bytes) -> ShardAnswer:
        url = f"{self._urls[number]}/corpora/{name}/retrieve"
        try:
            async with self._session.post(url, data=body) as response:
                text = await response.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            self._infos[number], self._faults[number] = None, f"{url} failed ({type(error).__name__} {error})"
            raise RequestError(503, self._faults[number], self.retry_after()) from None
        if response.status == 200:
            return orjson.loads(text)["result"]
        detail = f"shard {url}: {text[:500].decode(errors='replace')}"
        if response.status in (413, 422):  # a limit of its own, which another try meets again
            raise RequestError(response.status, detail)
        headers = self.retry_after()
        if "Retry-After" in response.headers:
            headers = {"Retry-After": response.headers["Retry-After"]}
        raise RequestError(503, detail, headers)

    async def _probe(self) -> None:
        """Ask every shard what it serves, again and again."""
        while True:
            await asyncio.gather(*(self._probe_one(number) for number in range(len(self._urls))))
            known = [info for info in self._infos if info is not None]
            if len(known) == len(self._infos):
                self._mismatch = mismatch(self._urls, known)
                self.names, self.default = tuple(known[0]["corpora"]), known[0]["default"]
                for name in self.names:
                    count = sum(info["corpora"][name]["count"] for info in known if name in info["corpora"])
                    self.metrics.passages.labels(name).set(count)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _probe_one(self, number: int) -> None:
        url = self._urls[number]
        fault = ""
        with suppress(ValueError):
            try:
                async with self._session.get(f"{url}/info", timeout=aiohttp.ClientTimeout(total=5)) as response:
                    content = await response.read()
                if response.status == 200:
                    self._infos[number] = orjson.loads(content)
                    return
                fault = f"HTTP {response.status} {content[:200].decode(errors='replace')}"
            except (TimeoutError, aiohttp.ClientError) as error:
                fault = f"{type(error).__name__} {error}"
        self._infos[number], self._faults[number] = None, f"shard {url} is not ready ({fault})"

    def describe(self) -> dict[str, Any]:
        self.check_ready()
        infos = [info for info in self._infos if info is not None]
        corpora = {
            name: dict(corpus)
            | {
                "count": sum(info["corpora"][name]["count"] for info in infos),
                "corpus_sha256": ",".join(info["corpora"][name]["corpus_sha256"] for info in infos),
            }
            for name, corpus in infos[0]["corpora"].items()
        }
        return {"default": self.default, "corpora": corpora, "limits": asdict(self.limits)}

    def refresh_metrics(self) -> None:
        self.metrics.waiting.set(self._num_waiting)
        self.metrics.ready.set(self._mismatch is None and None not in self._infos)


def merge(answers: Sequence[ShardAnswer], topk: int) -> ShardAnswer:
    """The `topk` best of all shards for each query; of equal scores, those of the earlier shard come first."""
    return [
        sorted((hit for hits in of_query for hit in hits), key=lambda hit: -hit["score"])[:topk]
        for of_query in zip(*answers, strict=True)
    ]


def mismatch(urls: Sequence[str], infos: Sequence[Info]) -> str | None:
    """Why these servers cannot be shards of one index, or None."""
    first = infos[0]
    for url, info in zip(urls, infos, strict=True):
        if set(info["corpora"]) != set(first["corpora"]):
            return f"shard {url} serves {sorted(info['corpora'])}, {urls[0]} serves {sorted(first['corpora'])}"
        for name, corpus in info["corpora"].items():
            if corpus["encoder"] is None:
                return f"corpus {name} of shard {url} is a BM25 index: its scores depend on the shard; use one server"
            if corpus["encoder"] != first["corpora"][name]["encoder"]:
                return f"corpus {name} of shard {url} has another encoder than that of {urls[0]}; build them alike"
    return None
