"""One question, one episode: the project's episode loop with its trace told as it grows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

from dgpo.agent.episode import EpisodeLimits, Policy, Search, run_episode
from dgpo.agent.modes import MODES
from dgpo.agent.protocol import SEARCH_R1_PROMPT, build_messages, encode_prompt
from dgpo.agent.trajectory import Trajectory
from dgpo.ask.trace import Piece, TagStream
from dgpo.config.schema import Config
from dgpo.errors import ConfigError

SMALL_VOCABULARY = 8192  # below it words are tokens, and a word that is none is spelt
_OPEN, _CLOSE = "<information>", "</information>"


class QuestionError(ConfigError):
    """A question that cannot be asked."""


class Asker:
    """Answers questions with one checkpoint; several may be in flight.

    Args:
        config: rules of the episode, `ask.prompt`, `ask.corpus`, `ask.mode` and the seed.
        policy: where it has an attribute `on_text`, that is set, and the trace comes token by token; else turn by turn.
        tokenizer: of the policy.
        search: finds the passages.
    """

    def __init__(self, config: Config, *, policy: Policy, tokenizer: Any, search: Search) -> None:
        self.config, self.policy, self.tokenizer, self.search = config, policy, tokenizer, search
        self.limits = EpisodeLimits.of(config.episode)
        self.mode = MODES[config.ask.mode]
        self.spells_words = len(tokenizer) < SMALL_VOCABULARY if hasattr(tokenizer, "__len__") else False
        self._numbers = itertools.count()
        self._listeners: dict[str, Callable[[str], None]] = {}
        self._end = getattr(tokenizer, "eos_token", None) or ""
        if hasattr(policy, "on_text"):
            policy.on_text = self._on_text

    async def ask(self, question: str, on_piece: Callable[[Piece], None]) -> Trajectory:
        """Plays the episode of a question; `on_piece` is called with its trace as it grows.

        Words that a small vocabulary does not hold, and which a small model cannot read, are told first.

        Raises:
            QuestionError: it is empty, or its prompt is longer than `episode.max_prompt_tokens`.
        """
        prompt_ids = self._prompt(question)
        unknown = unknown_words(question, self.tokenizer) if self.spells_words else []
        if unknown:
            words = "word" if len(unknown) == 1 else "words"
            on_piece(
                Piece(
                    "note", f"{words} that this model does not know, and reads letter by letter: {', '.join(unknown)}"
                )
            )
        name = f"ask-{next(self._numbers)}"
        stream = TagStream()
        streamed = False

        def hear(text: str) -> None:
            nonlocal streamed
            streamed = True
            tell(stream.feed(text.replace(self._end, "") if self._end else text))

        def tell(pieces: list[Piece]) -> None:
            for piece in pieces:
                on_piece(piece)

        def on_event(writer: str, text: str) -> None:
            nonlocal streamed
            if writer == "environment":
                tell([_environment_piece(text)])
                return
            if not streamed:
                hear(text)
            tell(stream.end_turn())
            streamed = False

        self._listeners[name] = hear
        try:
            trajectory = await run_episode(
                episode_id=name,
                prompt_ids=prompt_ids,
                policy=self.policy,
                search=self.search,
                tokenizer=self.tokenizer,
                limits=self.limits,
                corpus=self.config.ask.corpus,
                seed=self.config.seed,
                on_event=on_event,
                opening_query=question.strip() if self.mode.searches_first else "",
                max_turns=self.mode.max_turns,
            )
            trajectory.question = question.strip()
            return trajectory
        finally:
            del self._listeners[name]

    def _prompt(self, question: str) -> list[int]:
        if not question.strip():
            raise QuestionError("the question is empty: type one")
        ids = encode_prompt(
            self.tokenizer, build_messages(question, self.config.ask.prompt or self.mode.template or SEARCH_R1_PROMPT)
        )
        if len(ids) > self.config.episode.max_prompt_tokens:
            raise QuestionError(
                f"the question is too long: its prompt has {len(ids)} tokens, more than episode.max_prompt_tokens="
                f"{self.config.episode.max_prompt_tokens}: shorten it"
            )
        return ids

    def _on_text(self, request_id: str, text: str) -> None:
        if request_id in self._listeners:
            self._listeners[request_id](text)


def sources(trajectory: Trajectory) -> list[dict[str, str]]:
    """The passages that the episode saw, each once, in the order found: {"id", "title", "text", "query"}."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for record in trajectory.searches:
        for document in record.documents:
            title, _, text = document["contents"].partition("\n")
            source = {"id": str(document.get("id", "")), "title": title.strip('"'), "text": text, "query": record.query}
            found.setdefault((source["id"], document["contents"]), source)
    return list(found.values())


def ending(trajectory: Trajectory) -> str:
    """How the episode ended, in words; empty where it was answered."""
    if trajectory.status == "overflow" and not trajectory.searches:
        return "what the model wrote leaves no room for an answer"
    return {
        "answered": "",
        "no_answer": "no answer within the allowed turns",
        "overflow": "what was found leaves no room for an answer",
        "search_failed": "the retrieval server did not answer",
    }[trajectory.status]


def unknown_words(question: str, tokenizer: Any) -> list[str]:
    """Words of the question that are several tokens each, in order; names of several words may be one token."""
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = [(match.start(), match.end()) for match in re.finditer(r"\w+", question)]
    tokens_in = {word: sum(start < word[1] and end > word[0] for start, end in offsets) for word in words}
    return list(dict.fromkeys(question[start:end] for (start, end), count in tokens_in.items() if count > 1))


def _environment_piece(text: str) -> Piece:
    inside = text.strip()
    if inside.startswith(_OPEN) and inside.endswith(_CLOSE):
        return Piece("information", inside[len(_OPEN) : -len(_CLOSE)])
    return Piece("note", inside)
