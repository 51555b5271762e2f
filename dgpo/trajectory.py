"""The record of one episode: exactly the sampled tokens, who wrote which, and what was searched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["answered", "no_answer", "overflow", "search_failed"]


@dataclass
class SearchRecord:
    turn: int
    query: str
    documents: list[dict[str, Any]]
    num_cut_passages: int
    query_cut: bool
    latency_s: float


@dataclass
class Turn:
    """`response_ids[start:end]` are the tokens that the policy generated in this turn."""

    start: int
    end: int
    kind: str
    content: str


@dataclass
class Trajectory:
    """`response_mask` is 1 on generated tokens, 0 on what the environment wrote; `log_probs` (nats) are 0.0 there."""

    episode_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    log_probs: list[float]
    turns: list[Turn]
    searches: list[SearchRecord]
    answer: str | None
    status: Status
    counters: dict[str, int] = field(default_factory=dict)
    corpus: str | None = None

    @property
    def num_searches(self) -> int:
        return len(self.searches)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        data = json.loads(line)
        data["turns"] = [Turn(**turn) for turn in data["turns"]]
        data["searches"] = [SearchRecord(**record) for record in data["searches"]]
        return cls(**data)


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> int:
    """Writes one JSON line per episode, atomically. Returns how many."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(trajectory.to_json() + "\n")
            count += 1
    temporary.replace(path)
    return count


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield Trajectory.from_json(line)
