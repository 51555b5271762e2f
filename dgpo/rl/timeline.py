"""When the parts of a step happened: spans of the trainer and of every episode, in `train/timeline.jsonl`.

One span a line: {"step", "track", "name", "start", "end"}. `track` is "trainer" or an episode's id; times are seconds
of the wall clock, which all processes of a machine share. Spans of a track are disjoint or nested.
`scripts/bench/step.py` makes tables and a Chrome trace of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo.files import append_jsonl, read_jsonl

TRAINER = "trainer"
FILE = "timeline.jsonl"


@dataclass(frozen=True)
class Span:
    """`start` and `end` in seconds since the epoch."""

    step: int
    track: str
    name: str
    start: float
    end: float


class TimedSearch:
    """A search whose spans are kept, those of failed searches too."""

    def __init__(self, search: Any, spans: list[tuple[str, float, float]]) -> None:
        self.inner = search
        self.spans = spans

    async def search(self, query: str, *, topk: int, corpus: str | None) -> list[dict[str, Any]]:
        started = time.time()
        try:
            return await self.inner.search(query, topk=topk, corpus=corpus)
        finally:
            self.spans.append(("search", started, time.time()))


def write_spans(path: Path, step: int, tracks: Mapping[str, Iterable[Sequence[Any]]]) -> None:
    """Appends the spans (name, start, end) of a step's tracks."""
    append_jsonl(path, [Span(step, track, *span) for track, spans in tracks.items() for span in spans])


def read_spans(path: Path) -> list[Span]:
    return [Span(**record) for record in read_jsonl(path)]


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in Chrome's Trace Event Format, for chrome://tracing or ui.perfetto.dev.

    Two processes: the trainer with one thread, and the rollout, whose threads are lanes. An episode takes the first
    lane that is free for as long as it plays, so that there are as many lanes as episodes were in flight at once.
    """
    if not spans:
        return {"traceEvents": []}
    origin = min(span.start for span in spans)
    lanes = _lanes([span for span in spans if span.track != TRAINER])
    events: list[dict[str, Any]] = [_named(1, 0, "process_name", "trainer"), _named(2, 0, "process_name", "episodes")]
    events += [_named(2, lane, "thread_name", f"lane {lane}") for lane in sorted(set(lanes.values()))]
    for span in spans:
        of_trainer = span.track == TRAINER
        events.append(
            {
                "name": span.name,
                "cat": TRAINER if of_trainer else "episode",
                "ph": "X",
                "ts": round((span.start - origin) * 1e6),  # microseconds
                "dur": round((span.end - span.start) * 1e6),
                "pid": 1 if of_trainer else 2,
                "tid": 0 if of_trainer else lanes[(span.step, span.track)],
                "args": {"step": span.step} if of_trainer else {"step": span.step, "episode": span.track},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lanes(spans: Sequence[Span]) -> dict[tuple[int, str], int]:
    """(step, episode) -> the lane that it plays in."""
    times: dict[tuple[int, str], tuple[float, float]] = {}
    for span in spans:
        start, end = times.get((span.step, span.track), (span.start, span.end))
        times[(span.step, span.track)] = min(start, span.start), max(end, span.end)
    free_from: list[float] = []
    lanes = {}
    for episode, (start, end) in sorted(times.items(), key=lambda item: item[1]):
        lane = next((number for number, since in enumerate(free_from) if since <= start), len(free_from))
        free_from[lane:] = [end, *free_from[lane + 1 :]]
        lanes[episode] = lane
    return lanes


def _named(pid: int, tid: int, kind: str, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}
