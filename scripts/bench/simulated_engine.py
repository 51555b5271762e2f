"""A serving engine and a search server in simulated time, to drive real episode loops at a scale that is not at hand.

`run_simulated` runs coroutines on an event loop whose clock jumps to the next timer as soon as nothing else can go on:
minutes of waiting take none, and the same inputs give the same result.

`SimulatedEngine` is a continuous-batching engine with a prefix cache: per step it writes one token of every sequence
that runs, and reads the prompts of those that join, up to `max_num_seqs` sequences and `max_num_batched_tokens` tokens.
A step takes as long as dgpo/hardware/throughput.py estimates for one that decodes (weights and caches read once, or the
arithmetic; plus 6 ms of vLLM's own work), and the arithmetic of the prompts on top. These are assumptions from the data
sheet, not measurements; what is compared under them are the loops.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgpo.agent.episode import Generation
from dgpo.agent.seeds import derive_seed


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop that never waits: where it would, its clock jumps."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: SimulatedTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every coroutine waits for another one, and no timer is set: the simulation is stuck")
        self._loop.jump(max(timeout, 0.0))
        return super().select(0)


def run_simulated(main: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    """What `main` returns, and how many simulated seconds it took."""
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        result = runner.run(main)
        return result, runner.get_loop().time()


@dataclass(frozen=True)
class Speed:
    """How fast one engine is.

    Attributes:
        decode_step_s: seconds of a step for (sequences, mean context in tokens).
        prefill_tokens_per_s: of prompts.
    """

    decode_step_s: Callable[[float, float], float]
    prefill_tokens_per_s: float
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class WrittenTurn:
    """What the policy would write in a turn, before any budget.

    Attributes:
        token_ids: through the closing tag; without one, an invalid action.
        num_rambling: tokens that it would go on for behind the tag if nothing stopped it, before it ends by itself.
    """

    token_ids: list[int]
    num_rambling: int


@dataclass(eq=False)
class _Sequence:
    num_prompt: int  # tokens to read: those that are not in the cache
    context: int  # tokens before the next one
    num_left: int  # tokens to write
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SimulatedEngine:
    """An episode `Policy`. Use as `async with SimulatedEngine(...) as engine`.

    Args:
        write: what the policy writes in the next turn of an episode, by the episode's name: the request id up to a `/`.
        end_token: the id of the end-of-sequence token.
        filler: the id of the tokens behind a tag that was not stopped at.

    Attributes:
        busy_s: seconds with a step under way.
        running_s: sum over steps of seconds times sequences; by `max_num_seqs` and wall time, the utilisation.
        num_generated, num_prefilled: tokens.
    """

    def __init__(
        self,
        speed: Speed,
        *,
        write: Callable[[str], WrittenTurn],
        end_token: int,
        filler: int,
        prefix_caching: bool = True,
    ) -> None:
        self.speed, self.write, self.end_token, self.filler = speed, write, end_token, filler
        self.prefix_caching = prefix_caching
        self.busy_s = self.running_s = 0.0
        self.num_generated = self.num_prefilled = 0
        self._cached: dict[str, int] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._wake = asyncio.Event()

    async def __aenter__(self) -> SimulatedEngine:
        self._task = asyncio.create_task(self._steps())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """Through the tag if anything stops a turn, else through what would follow; at most `max_tokens`."""
        episode = request_id.split("/")[0]
        turn = self.write(episode)
        ids = list(turn.token_ids)
        if not stop:
            ids += [self.filler] * turn.num_rambling + [self.end_token]
        reason = "length" if len(ids) > max_tokens else "stop"
        ids = ids[:max_tokens]
        cached = min(self._cached.get(episode, 0), len(token_ids)) if self.prefix_caching else 0
        sequence = _Sequence(len(token_ids) - cached, len(token_ids), len(ids))
        self._waiting.append(sequence)
        self._wake.set()
        await sequence.done
        self._cached[episode] = len(token_ids) + min(len(turn.token_ids), len(ids))  # the rest is cut off
        return Generation(ids, [0.0] * len(ids), reason)

    async def _steps(self) -> None:
        while True:
            while not self._waiting and not self._running:
                self._wake.clear()
                await self._wake.wait()
            num_prompt_tokens = self._admit()
            seconds = self._step_s(num_prompt_tokens)
            await asyncio.sleep(seconds)
            self.busy_s += seconds
            self.running_s += seconds * len(self._running)
            self.num_generated += len(self._running)
            self.num_prefilled += num_prompt_tokens
            for sequence in self._running:
                sequence.context += 1
                sequence.num_left -= 1
                if sequence.num_left == 0:
                    sequence.done.set_result(None)
            self._running = [sequence for sequence in self._running if sequence.num_left]

    def _admit(self) -> int:
        """Lets waiting sequences join while there is room. Returns the tokens of theirs that are read."""
        room = self.speed.max_num_batched_tokens - len(self._running)
        num_prompt_tokens = 0
        while self._waiting and len(self._running) < self.speed.max_num_seqs:
            first = self._waiting[0]
            if num_prompt_tokens and num_prompt_tokens + first.num_prompt > room:
                break
            num_prompt_tokens += first.num_prompt
            self._running.append(self._waiting.popleft())
        return num_prompt_tokens

    def _step_s(self, num_prompt_tokens: int) -> float:
        number = len(self._running)
        context = sum(sequence.context for sequence in self._running) / number
        return self.speed.decode_step_s(number, context) + num_prompt_tokens / self.speed.prefill_tokens_per_s


def query_latency_s(query: str, low_ms: float, high_ms: float) -> float:
    """Uniform between the bounds, and the same for the same query."""
    return (low_ms + (high_ms - low_ms) * derive_seed("latency", query) / 2**31) / 1000


class SimulatedSearch:
    """Answers after a query's own latency, with documents of a fixed size.

    Args:
        latency_s: of a query.
        documents: of every answer.
    """

    def __init__(self, latency_s: Callable[[str], float], documents: list[dict[str, Any]]) -> None:
        self.latency_s, self.documents = latency_s, documents

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        await asyncio.sleep(self.latency_s(query))
        return self.documents[:topk]

    async def search_batch(self, queries: list[str]) -> list[list[dict[str, Any]]]:
        """All at once: answered with the slowest."""
        await asyncio.sleep(max(map(self.latency_s, queries)))
        return [self.documents for _ in queries]
