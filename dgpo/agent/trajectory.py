"""The record of one episode: exactly the sampled tokens, who wrote which, and what was searched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dgpo.agent.protocol import ActionKind
from dgpo.errors import DataError
from dgpo.files import json_line, write_jsonl

Status = Literal["answered", "no_answer", "overflow", "search_failed"]
Origin = Literal["sampled", "text"]


@dataclass
class SearchRecord:
    """One search that was answered."""

    turn: int  # index into `Trajectory.turns`; -1 for a search of the environment before the first turn
    query: str  # as sent, so after any cut
    documents: list[dict[str, Any]]  # as rendered, so after any cut
    num_cut_passages: int
    query_cut: bool
    latency_s: float  # retries included


@dataclass
class Turn:
    """`response_ids[start:end]` are the tokens that the policy generated in this turn."""

    start: int
    end: int
    kind: ActionKind
    content: str  # the query as the policy wrote it, or the answer


@dataclass
class Trajectory:
    """One question end to end. The response holds every turn and every observation, and ends on a policy token.

    Attributes:
        prompt_ids: [P].
        response_ids: [T] as sampled, or as the environment's texts were tokenised.
        response_mask: [T] 1 on generated tokens, 0 on what the environment wrote.
        log_probs: [T] nats under the policy that sampled, 0.0 on environment tokens, None on an end token that was
            appended; empty where the policy gave none.
        turns: in order; observations stand between them.
        searches: in order. The passages of a search that ended the episode as `overflow` were never shown.
        answer: None without a complete `<answer>`; may be "".
        status: how it ended.
        counters: num_cut_passages, num_cut_queries, num_invalid_actions, num_truncated_turns; of an episode that was
            kept for the cold start also num_dropped_tail_tokens, num_appended_end_tokens.
        corpus: the retrieval server's named corpus, None for its default.
        question: as the data have it; None where whoever played did not say.
        golds: the accepted answers, empty where they are not known.
        origin: `sampled`, token ids as a policy gave them; `text`, where a text was all there was, tokenised once.
    """

    episode_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    log_probs: list[float | None]
    turns: list[Turn]
    searches: list[SearchRecord]
    answer: str | None
    status: Status
    counters: dict[str, int] = field(default_factory=dict)
    corpus: str | None = None
    question: str | None = None
    golds: list[str] = field(default_factory=list)
    origin: Origin = "sampled"

    @property
    def num_searches(self) -> int:
        """Searches that were answered."""
        return len(self.searches)

    def to_json(self) -> str:
        """One line of JSON."""
        return json_line(self)

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """The inverse of `to_json`."""
        data = json.loads(line)
        data["turns"] = [Turn(**turn) for turn in data["turns"]]
        data["searches"] = [SearchRecord(**record) for record in data["searches"]]
        return cls(**data)


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> int:
    """Writes one JSON line per episode, the file whole or not at all. Returns how many."""
    return write_jsonl(path, trajectories)


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """The episodes of a file, one at a time.

    Raises:
        DataError: a line is no trajectory; names the file and the line.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                trajectory = Trajectory.from_json(line)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}, line {number} is no recorded episode ({error!r}): collect again with this version"
                ) from error
            yield trajectory
