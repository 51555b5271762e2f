"""The multi-turn search episode, free of any engine: the same loop for RL, collection, evaluation and `ask`."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Protocol

from dgpo.agent.protocol import (
    INVALID_ACTION_TEXT,
    STOP_STRINGS,
    Action,
    parse_action,
    render_observation,
    render_passages,
)
from dgpo.agent.search import SearchFailedError
from dgpo.agent.seeds import derive_seed
from dgpo.agent.trajectory import SearchRecord, Status, Trajectory, Turn
from dgpo.config.schema import EpisodeConfig
from dgpo.errors import ConfigError, DgpoError


@dataclass(frozen=True)
class Generation:
    """One turn as sampled: `log_probs[i]` (nats) belongs to `token_ids[i]`, a sampled end-of-sequence token included.

    A policy that was not asked for log-probs leaves them empty.
    `finish_reason` is `stop` for a stop string or that token, `length` for a used-up budget, `abort` for neither.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str

    def __post_init__(self) -> None:
        if self.log_probs and len(self.token_ids) != len(self.log_probs):
            raise ValueError(f"{len(self.token_ids)} sampled tokens but {len(self.log_probs)} log-probs: need one each")


class Policy(Protocol):
    """Continues `token_ids` by one turn of 1 to `max_tokens` tokens. `request_id` is the same for a whole episode."""

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation: ...


class Search(Protocol):
    """Finds documents `{"id", "contents"}`, best first; raises `SearchFailedError` when the server does not answer."""

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]: ...


class Tokenizer(Protocol):
    """The policy's tokenizer, with methods of Hugging Face's. Hashable: the caches of token ids are keyed by it."""

    def __hash__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class EpisodeLimits:
    """Counts and token budgets, each at least 1. Meanings and defaults: `dgpo.config.schema.EpisodeConfig`."""

    max_turns: int
    max_turn_tokens: int
    max_response_tokens: int
    min_turn_tokens: int
    topk: int
    max_passage_tokens: int
    max_query_chars: int

    @classmethod
    def of(cls, episode: EpisodeConfig) -> EpisodeLimits:
        return cls(**{limit.name: getattr(episode, limit.name) for limit in fields(cls)})

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"episode.{limit.name} is {getattr(self, limit.name)}, expected at least 1: raise it")


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
    given: str = "",
    forced: str = "",
    opening_query: str = "",
    max_turns: int | None = None,
) -> Trajectory:
    """Plays one question from prompt to end. Token in, token out: sampled ids are kept, never tokenised again.

    At most `max_turns` turns may search; one last turn follows in which a search is not executed. A turn may use
    min(max_turn_tokens, what is left of max_response_tokens). A turn without a complete action, or with an empty query,
    is an invalid action: it uses up its turn, and the environment explains the format. The episode ends as

    - `answered`: on the first complete answer;
    - `no_answer`: after the last turn;
    - `overflow`: where an observation would leave less than `min_turn_tokens` for the next turn; it is not appended;
    - `search_failed`: where the server did not answer. That is no fault of the policy: keep it out of the gradient.

    Args:
        episode_id: unique among the episodes in flight; also the request id of all its turns, for the prefix cache.
        prompt_ids: [P], from `dgpo.agent.protocol.encode_prompt`.
        stop: strings that end a turn. Collection leaves out `</answer>`, so that the teacher's end-of-sequence token
            after it is sampled, recorded and later trained.
        corpus: the retrieval server's named corpus, None for its default.
        seed: turn t samples with a seed derived from (seed, t); None leaves sampling to the engine.
        on_event: called with ("policy" | "environment", text) as the episode grows.
        given: text of the environment with which the response begins, such as an observation that no search asked for.
        forced: the beginning of the first turn, written by the environment too: a policy that must go on with
            `<answer>`. It is parsed with the turn, and the episode ends after that turn.
        opening_query: with which the environment itself searches first; the response begins with what that brings.
        max_turns: instead of the limits'; 0 leaves the last turn alone.

    Raises:
        DgpoError: the first turn has no token, nor has any other; or the engine aborted a turn.
        ValueError: `given` leaves no room for a turn.
        SearchRefusedError: the server will never answer such a search; from the search function.
    """
    episode = _Episode(episode_id, prompt_ids, tokenizer, limits, corpus, on_event)
    try:
        opening = await episode.search(opening_query, search) if opening_query else ""
    except SearchFailedError:
        return episode.end("search_failed")
    episode.open(opening, given, forced)
    last_turn = 0 if forced else limits.max_turns if max_turns is None else max_turns
    for turn_index in range(last_turn + 1):
        generation = await policy.generate(
            prompt_ids + episode.ids,
            max_tokens=min(limits.max_turn_tokens, limits.max_response_tokens - len(episode.ids)),
            stop=stop,
            seed=None if seed is None else derive_seed(seed, turn_index),
            request_id=episode_id,
        )
        action = episode.add_turn(generation, begun_with=forced)
        if action.kind == "answer":
            return episode.end("answered", answer=action.content)
        if turn_index == last_turn:
            break
        try:
            observation = await episode.observe(action, search)
        except SearchFailedError:
            return episode.end("search_failed")
        if not episode.add_observation(observation):
            return episode.end("overflow")
    return episode.end("no_answer")


@dataclass
class _Episode:
    """The growing episode: the response's token ids, who wrote them, and what happened."""

    episode_id: str
    prompt_ids: list[int]
    tokenizer: Tokenizer
    limits: EpisodeLimits
    corpus: str | None
    on_event: Callable[[str, str], None] | None
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    has_log_probs: bool = True
    turns: list[Turn] = field(default_factory=list)
    searches: list[SearchRecord] = field(default_factory=list)
    num_truncated_turns: int = 0

    def open(self, *texts: str) -> None:
        """Begins the response with texts of the environment; empty ones are none."""
        for text in filter(None, texts):
            self._append_environment(text, self._encode(text))
        if self.ids and len(self.ids) + self.limits.min_turn_tokens > self.limits.max_response_tokens:
            raise ValueError(
                f"episode {self.episode_id!r} is given {len(self.ids)} tokens, which leaves less than episode."
                f"min_turn_tokens={self.limits.min_turn_tokens} of max_response_tokens="
                f"{self.limits.max_response_tokens}: raise that"
            )

    def add_turn(self, generation: Generation, *, begun_with: str) -> Action:
        """Appends a turn as sampled. Returns its action; what the environment began it with is parsed with it."""
        if generation.finish_reason == "abort":
            raise DgpoError(f"episode {self.episode_id!r}: the engine aborted turn {len(self.turns)}; play it again")
        start = len(self.ids)
        self.ids += generation.token_ids
        self.mask += [1] * len(generation.token_ids)
        self.log_probs += generation.log_probs
        self.has_log_probs &= len(generation.log_probs) == len(generation.token_ids)
        self.num_truncated_turns += generation.finish_reason == "length"
        text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=False)
        action = _valid_action(begun_with + text)
        self.turns.append(Turn(start, len(self.ids), action.kind, action.content))
        if self.on_event:
            self.on_event("policy", text)
        return action

    async def observe(self, action: Action, search: Search) -> str:
        """What the environment replies to the last turn: what a search found, or how to write an action."""
        return INVALID_ACTION_TEXT if action.kind != "search" else await self.search(action.content, search)

    async def search(self, query: str, search: Search) -> str:
        """Executes and records a search. Returns the observation."""
        record = await _execute_search(
            query,
            turn=max(len(self.turns) - 1, 0),
            search=search,
            tokenizer=self.tokenizer,
            limits=self.limits,
            corpus=self.corpus,
        )
        self.searches.append(record)
        return render_observation(render_passages(record.documents))

    def add_observation(self, text: str) -> bool:
        """Appends the environment's reply; false, and nothing appended, where it leaves too little for a turn."""
        ids = self._encode(text)
        if len(self.ids) + len(ids) + self.limits.min_turn_tokens > self.limits.max_response_tokens:
            return False
        self._append_environment(text, ids)
        return True

    def end(self, status: Status, *, answer: str | None = None) -> Trajectory:
        """The record of the episode, which ends on a token of the policy."""
        self._drop_trailing_observations()
        if not self.ids and status != "search_failed":
            raise DgpoError(
                f"episode {self.episode_id!r}: the policy generated no token in {len(self.turns)} turns: check that "
                "the engine returns the end-of-sequence token that it samples, and that the prompt leaves room for a "
                "turn"
            )
        for turn in self.turns:  # a turn without tokens may have stood behind an observation that was dropped
            turn.start, turn.end = min(turn.start, len(self.ids)), min(turn.end, len(self.ids))
        return Trajectory(
            episode_id=self.episode_id,
            prompt_ids=list(self.prompt_ids),
            response_ids=self.ids,
            response_mask=self.mask,
            log_probs=list(self.log_probs) if self.has_log_probs else [],
            turns=self.turns,
            searches=self.searches,
            answer=answer,
            status=status,
            counters={
                "num_cut_passages": sum(record.num_cut_passages for record in self.searches),
                "num_cut_queries": sum(record.query_cut for record in self.searches),
                "num_invalid_actions": sum(turn.kind == "invalid" for turn in self.turns),
                "num_truncated_turns": self.num_truncated_turns,
            },
            corpus=self.corpus,
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return _token_ids(text, self.tokenizer)

    def _append_environment(self, text: str, ids: Sequence[int]) -> None:
        self.ids += ids
        self.mask += [0] * len(ids)
        self.log_probs += [0.0] * len(ids)
        if self.on_event:
            self.on_event("environment", text)

    def _drop_trailing_observations(self) -> None:
        """The reward sits on the response's last token, which must be the policy's own."""
        length = len(self.mask)
        while length and not self.mask[length - 1]:
            length -= 1
        del self.ids[length:], self.mask[length:], self.log_probs[length:]


def _valid_action(text: str) -> Action:
    """The parsed action, where a search for nothing is none: the server would refuse it, and the policy caused it."""
    action = parse_action(text)
    return Action("invalid", "") if action.kind == "search" and not action.content else action


async def _execute_search(
    query: str, *, turn: int, search: Search, tokenizer: Tokenizer, limits: EpisodeLimits, corpus: str | None
) -> SearchRecord:
    """Searches with the query cut to its limit, and cuts the passages that come back to theirs."""
    sent = query[: limits.max_query_chars].rstrip()
    started = time.perf_counter()
    found = _checked(await search.search(sent, topk=limits.topk, corpus=corpus))
    latency_s = time.perf_counter() - started
    documents = [cut_passage(document, tokenizer, limits.max_passage_tokens) for document in found]
    return SearchRecord(
        turn=turn,
        query=sent,
        documents=documents,
        num_cut_passages=sum(after is not before for before, after in zip(found, documents, strict=True)),
        query_cut=sent != query,
        latency_s=latency_s,
    )


def _checked(found: Any) -> list[dict[str, Any]]:
    """What a search returned, which may be anyone's, against the contract of `Search`."""
    if not isinstance(found, list):
        raise ConfigError(
            f"the search returned {repr(found)[:100]}, expected a list of documents: correct retriever.backend "
            "(docs/extending.md)"
        )
    for document in found:
        if not (isinstance(document, dict) and isinstance(document.get("contents"), str)):
            raise ConfigError(
                f"the search returned a document {repr(document)[:100]}, expected {{'id': .., 'contents': text}}: "
                "correct retriever.backend (docs/extending.md)"
            )
    return found


def cut_passage(document: dict[str, Any], tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    """The document itself if its contents fit into `max_tokens`, else a copy with the longest beginning that fits.

    Characters are cut, not ids: decoding cut ids could split a character, or change the spaces.
    """
    text = document["contents"]
    num_kept = _num_chars_that_fit(text, tokenizer, max_tokens)
    return document if num_kept == len(text) else {**document, "contents": text[:num_kept]}


@lru_cache(maxsize=1 << 10)  # episodes of a question often see the same observations
def _token_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=1 << 14)  # the same passages are found again and again
def _num_chars_that_fit(text: str, tokenizer: Tokenizer, max_tokens: int) -> int:
    def num_tokens(num_chars: int) -> int:
        return len(tokenizer.encode(text[:num_chars], add_special_tokens=False))

    if num_tokens(len(text)) <= max_tokens:
        return len(text)
    return bisect_right(range(len(text)), max_tokens, key=num_tokens) - 1
