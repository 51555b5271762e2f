"""Recorded episodes in Python: load, score, plot, and play one with a policy of your own.

python examples/episodes.py runs/own-docs/test/agent/trajectories.jsonl [plot.svg]
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgpo.agent.episode import EpisodeLimits, Generation, Search, run_episode
from dgpo.agent.scoring import episode_scores
from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.metrics.intervals import bootstrap_ci


def score(path: str | Path) -> dict[str, Any]:
    """Exact match with its 95% interval, and how episodes ended, of a file of trajectories."""
    episodes = list(read_trajectories(path))
    em = [episode_scores(episode, episode.golds)["em"] for episode in episodes]
    return {
        "episodes": len(episodes),
        "em": sum(em) / len(em),
        "em_ci95": bootstrap_ci(em),
        "status": dict(Counter(episode.status for episode in episodes)),
        "searches": dict(sorted(Counter(episode.num_searches for episode in episodes).items())),
    }


def plot(counts: dict[int, int], *, width: int = 300, bar: int = 22) -> str:
    """Episodes by number of searches, as an SVG picture; any plotting library would do."""
    most = max(counts.values())
    rows = [
        f'<text x="0" y="{i * bar + 15}">{name}</text><rect x="24" y="{i * bar + 3}" height="{bar - 6}" '
        f'width="{(width - 80) * count / most:.0f}" fill="#4477aa"/>'
        f'<text x="{30 + (width - 80) * count / most:.0f}" y="{i * bar + 15}">{count}</text>'
        for i, (name, count) in enumerate(counts.items())
    ]
    size = f'width="{width}" height="{bar * len(rows)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="13">{"".join(rows)}</svg>'


class Echo:
    """A policy of one's own: searches for what it is told, then answers with the title of the first passage."""

    def __init__(self, tokenizer: Any, query: str) -> None:
        self.tokenizer, self.query = tokenizer, query

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """Continues the episode by one turn, as token ids."""
        _, found, rest = self.tokenizer.decode(token_ids, skip_special_tokens=False).rpartition("Doc 1(Title: ")
        title = rest.partition(")")[0].strip('"')
        text = f"<answer>{title}</answer>" if found else f"<search>{self.query}</search>"
        return Generation(self.tokenizer.encode(text, add_special_tokens=False)[:max_tokens], [], "stop")


def play(policy: Echo, search: Search, prompt_ids: list[int], limits: EpisodeLimits) -> Trajectory:
    """One episode through the loop that training, evaluation and `ask` use."""
    options = {"policy": policy, "search": search, "tokenizer": policy.tokenizer, "limits": limits}
    return asyncio.run(run_episode(episode_id="mine", prompt_ids=prompt_ids, **options))


if __name__ == "__main__":
    numbers = score(sys.argv[1])
    print(*(f"{name}: {value}" for name, value in numbers.items()), sep="\n")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(plot(numbers["searches"]))
