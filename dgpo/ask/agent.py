"""The agent as a library: a checkpoint and a search, one question at a time or many at once.

from dgpo import Agent

with Agent("runs/own-docs") as agent:
    print(agent.ask("Who wrote it?").text)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from dgpo.agent.episode import Policy, Search
from dgpo.agent.plugins import open_search
from dgpo.agent.trajectory import Trajectory
from dgpo.ask.asker import Asker, sources
from dgpo.ask.command import asked_config, opened, served
from dgpo.ask.trace import Piece
from dgpo.checks import check_ask
from dgpo.config.schema import Config
from dgpo.runs.asking import ASKING

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What the agent answered.

    Attributes:
        text: None where it gave no answer; `trajectory.status` says why.
        sources: the passages that it saw, each once: {"id", "title", "text", "query"}.
        trajectory: the whole episode.
    """

    text: str | None
    sources: list[dict[str, str]]
    trajectory: Trajectory


class Agent:
    """A search agent. Use as `with` or `async with`, or call `close()`. It starts with the first question at latest.

    Args:
        model: a checkpoint, or the run folder of `dgpo own` or `quickstart`, which brings its rules and its indexes.
        search: the retrieval server's URL, or an object with `async search(query, *, topk, corpus)`; None: the run's
            own indexes, or `retriever.*` of the settings.
        settings: overrides of the configuration, such as `hardware=cpu` or `ask.mode=rag`.
        policy, tokenizer: a policy of your own instead of the checkpoint's engine; `model` is not loaded then.

    Raises:
        ConfigError: what `dgpo ask` refuses: no checkpoint, no retriever, settings that do not go together.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        search: str | Search | None = None,
        settings: Sequence[str] = (),
        policy: Policy | None = None,
        tokenizer: Any = None,
    ) -> None:
        named = "run_dir" if (Path(model) / ASKING).is_file() else "ask.model"
        url = [f"retriever.url={search}"] if isinstance(search, str) else []
        self._overrides = [f"{named}={model}", *url, *settings]
        self._search = None if isinstance(search, str) else search
        self._policy, self._tokenizer = policy, tokenizer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = contextlib.AsyncExitStack()
        self._asker: Asker | None = None

    def ask(self, question: str, *, on_piece: Callable[[Piece], None] | None = None) -> Answer:
        """Answers one question.

        Args:
            on_piece: called with the trace as it grows, from another thread.

        Raises:
            QuestionError: it is empty, or too long.
        """
        self.start()
        return self._wait(self._answer(question, on_piece))

    def ask_many(self, questions: Sequence[str]) -> list[Answer]:
        """Answers questions side by side, in their order."""
        self.start()

        async def all_of_them() -> list[Answer]:
            return await asyncio.gather(*(self._answer(question, None) for question in questions))

        return self._wait(all_of_them())

    async def ask_async(self, question: str, *, on_piece: Callable[[Piece], None] | None = None) -> Answer:
        """As `ask`, for a caller with an event loop; cancelling it ends the episode."""
        await asyncio.to_thread(self.start)
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(self._answer(question, on_piece), self._loop)
        return await asyncio.wrap_future(future)

    def start(self) -> None:
        """Loads the checkpoint and starts the retriever; does nothing when that is done."""
        if self._asker is not None:
            return
        self._loop = asyncio.new_event_loop()  # the engine lives in one loop, whatever loops its callers have
        threading.Thread(target=self._loop.run_forever, daemon=True, name="dgpo-agent").start()
        try:
            self._asker = self._wait(self._open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the engine and the retriever that it started."""
        loop, self._loop, self._asker = self._loop, None, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._stack.aclose(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._stack = contextlib.AsyncExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def _open(self) -> Asker:
        if self._policy is not None:
            return await self._stack.enter_async_context(self._opened_with_policy(self._policy))
        config, run = asked_config(self._overrides)
        if self._search is None:
            url_named = any(each.startswith("retriever.url=") for each in self._overrides)
            self._stack.enter_context(served(config, run, reuse=url_named))
            check_ask(config)
        return await self._stack.enter_async_context(opened(config, search=self._search))

    @contextlib.asynccontextmanager
    async def _opened_with_policy(self, policy: Policy) -> AsyncIterator[Asker]:
        config: Config = asked_config(self._overrides)[0]
        async with contextlib.AsyncExitStack() as stack:
            search: Any = self._search or await stack.enter_async_context(open_search(config.retriever))
            yield Asker(config, policy=policy, tokenizer=self._tokenizer, search=search)

    async def _answer(self, question: str, on_piece: Callable[[Piece], None] | None) -> Answer:
        assert self._asker is not None
        trajectory = await self._asker.ask(question, on_piece or (lambda _: None))
        return Answer(trajectory.answer, sources(trajectory), trajectory)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
