"""The multi-turn search episode, free of any engine: the same loop for RL, collection, evaluation and `ask`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dgpo.protocol import INVALID_ACTION_TEXT, STOP_STRINGS, parse_action, render_observation, render_passages
from dgpo.search import SearchFailedError
from dgpo.seeds import derive_seed
from dgpo.trajectory import SearchRecord, Status, Trajectory, Turn


@dataclass(frozen=True)
class Generation:
    """One turn as sampled: `log_probs[i]` (nats) belongs to `token_ids[i]`."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


class Policy(Protocol):
    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation: ...


class Search(Protocol):
    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]: ...


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class EpisodeLimits:
    """Counts and token budgets; their defaults live in `dgpo.config.schema.EpisodeConfig`."""

    max_turns: int
    max_turn_tokens: int
    max_response_tokens: int
    min_turn_tokens: int
    topk: int
    max_passage_tokens: int
    max_query_chars: int


@dataclass
class _Response:
    """The growing response: token ids with who wrote them."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def append(self, ids: list[int], *, log_probs: list[float] | None) -> None:
        self.ids += ids
        self.mask += [int(log_probs is not None)] * len(ids)
        self.log_probs += log_probs if log_probs is not None else [0.0] * len(ids)

    def drop_environment_tail(self) -> None:
        """An episode ends on a policy token: the reward sits on its last token."""
        while self.mask and not self.mask[-1]:
            self.ids.pop(), self.mask.pop(), self.log_probs.pop()


async def run_episode(
    *,
    episode_id: str,
    prompt_ids: list[int],
    policy: Policy,
    search: Search,
    tokenizer: Tokenizer,
    limits: EpisodeLimits,
    stop: Sequence[str] = STOP_STRINGS,
    corpus: str | None = None,
    seed: int | None = None,
    on_event: Callable[[str, str], None] | None = None,
) -> Trajectory:
    """Plays one question from prompt to end.

    At most `max_turns` turns may search; an invalid action (an empty query is one) uses up a turn. In the one last turn
    that follows, a search is not executed and the episode ends as `no_answer`. An observation that would leave less
    than `min_turn_tokens` is not appended and the episode ends as `overflow`. A search that fails for good ends it as
    `search_failed`. The sampled ids are kept as they are; only what the environment writes is tokenised.

    Args:
        prompt_ids: [P] token ids.
        stop: strings that end a turn; collection leaves out `</answer>`, to keep the teacher's own end token.
        seed: turns sample with seeds derived from it; None leaves sampling to the engine.
        on_event: called with ("policy" | "environment", text) as the episode grows.

    Raises:
        ValueError: the policy generated nothing at all, so that there is nothing to record.
    """
    response, turns, searches = _Response(), [], []
    counters = dict.fromkeys(("num_cut_passages", "num_cut_queries", "num_invalid_actions", "num_truncated_turns"), 0)
    answer: str | None = None
    status: Status = "no_answer"
    for number in range(limits.max_turns + 1):
        budget = min(limits.max_turn_tokens, limits.max_response_tokens - len(response.ids))
        generation = await policy.generate(
            prompt_ids + response.ids,
            max_tokens=budget,
            stop=stop,
            seed=None if seed is None else derive_seed(seed, number),
            request_id=episode_id,
        )
        start = len(response.ids)
        response.append(list(generation.token_ids), log_probs=list(generation.log_probs))
        text = tokenizer.decode(list(generation.token_ids), skip_special_tokens=False)
        if on_event:
            on_event("policy", text)
        action = parse_action(text)
        kind = "invalid" if action.kind == "search" and not action.content else action.kind
        turns.append(Turn(start, len(response.ids), kind, action.content))
        counters["num_truncated_turns"] += generation.finish_reason == "length"
        counters["num_invalid_actions"] += kind == "invalid"
        if kind == "answer":
            answer, status = action.content, "answered"
            break
        if number == limits.max_turns:
            break
        if kind == "search":
            try:
                record = await _search(action.content, number, search, tokenizer, limits, corpus)
            except SearchFailedError:
                status = "search_failed"
                break
            searches.append(record)
            counters["num_cut_passages"] += record.num_cut_passages
            counters["num_cut_queries"] += record.query_cut
            observation = render_observation(render_passages(record.documents))
        else:
            observation = INVALID_ACTION_TEXT
        observation_ids = tokenizer.encode(observation, add_special_tokens=False)
        if len(response.ids) + len(observation_ids) + limits.min_turn_tokens > limits.max_response_tokens:
            status = "overflow"
            break
        response.append(observation_ids, log_probs=None)
        if on_event:
            on_event("environment", observation)
    response.drop_environment_tail()
    if not response.ids:
        raise ValueError(f"episode {episode_id!r}: the policy generated no token; is its end token sampled at once?")
    return Trajectory(
        episode_id=episode_id,
        prompt_ids=list(prompt_ids),
        response_ids=response.ids,
        response_mask=response.mask,
        log_probs=response.log_probs,
        turns=turns,
        searches=searches,
        answer=answer,
        status=status,
        counters=counters,
        corpus=corpus,
    )


async def _search(
    query: str, turn: int, search: Search, tokenizer: Tokenizer, limits: EpisodeLimits, corpus: str | None
) -> SearchRecord:
    """One search with its passages cut to `max_passage_tokens` each."""
    started = time.perf_counter()
    sent = query[: limits.max_query_chars]
    documents = await search.search(sent, topk=limits.topk, corpus=corpus)
    latency_s = time.perf_counter() - started
    cut = [_cut_passage(document, tokenizer, limits.max_passage_tokens) for document in documents]
    num_cut = sum(before is not after for before, after in zip(documents, cut, strict=True))
    return SearchRecord(turn, sent, cut, num_cut, sent != query, latency_s)


def _cut_passage(document: dict[str, Any], tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    ids = tokenizer.encode(document["contents"], add_special_tokens=False)
    if len(ids) <= max_tokens:
        return document
    return {**document, "contents": tokenizer.decode(ids[:max_tokens], skip_special_tokens=False)}
