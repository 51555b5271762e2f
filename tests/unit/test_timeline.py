"""Spans of a step: the Chrome trace, and the table that the benchmark makes of them."""

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest

from dgpo.agent.search import SearchFailedError
from dgpo.rl.timeline import TRAINER, Span, TimedSearch, chrome_trace, read_spans, write_spans

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "step.py"


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_step", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failed_search_has_a_span_too():
    class Down:
        async def search(self, query, *, topk, corpus):
            raise SearchFailedError("down")

    spans = []
    with pytest.raises(SearchFailedError):
        asyncio.run(TimedSearch(Down(), spans).search("q", topk=1, corpus=None))
    assert [name for name, _, _ in spans] == ["search"]


def test_written_spans_are_read_back(tmp_path):
    path = tmp_path / "timeline.jsonl"
    write_spans(path, 1, {TRAINER: [("step", 1.0, 2.0)], "a": [["generate", 1.0, 1.5]]})
    write_spans(path, 2, {TRAINER: [("step", 2.0, 3.0)]})
    assert read_spans(path) == [
        Span(1, TRAINER, "step", 1.0, 2.0),
        Span(1, "a", "generate", 1.0, 1.5),
        Span(2, TRAINER, "step", 2.0, 3.0),
    ]


def test_episodes_that_do_not_overlap_share_a_lane_of_the_trace():
    spans = [
        Span(1, TRAINER, "step", 10.0, 14.0),
        Span(1, "a", "generate", 10.0, 11.0),
        Span(1, "a", "search", 11.0, 11.5),
        Span(1, "b", "generate", 10.5, 12.0),
        Span(1, "c", "generate", 11.5, 13.0),
    ]
    trace = json.loads(json.dumps(chrome_trace(spans)))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["args"].get("episode"): event["tid"] for event in complete if event["pid"] == 2} == {
        "a": 0,
        "b": 1,
        "c": 0,
    }
    step = next(event for event in complete if event["name"] == "step")
    assert (step["ts"], step["dur"], step["pid"]) == (0, 4_000_000, 1)
    search = next(event for event in complete if event["name"] == "search")
    assert (search["ts"], search["dur"]) == (1_000_000, 500_000)


def test_a_trace_of_nothing_is_empty():
    assert chrome_trace([]) == {"traceEvents": []}


def test_the_parts_of_a_step_add_up_and_a_search_counts_where_nothing_generates():
    spans = [
        Span(1, TRAINER, "prepare", 0.0, 1.0),
        Span(1, TRAINER, "gen", 1.0, 6.0),
        Span(1, TRAINER, "ref", 6.0, 7.0),
        Span(1, TRAINER, "teacher", 6.5, 7.0),
        Span(1, TRAINER, "update_actor", 7.0, 9.0),
        Span(1, TRAINER, "step", 0.0, 9.5),
        Span(1, "a", "generate", 1.0, 2.0),
        Span(1, "a", "search", 2.0, 4.0),  # hidden behind b's turn until 3
        Span(1, "b", "generate", 1.5, 3.0),
        Span(1, "a", "generate", 4.0, 5.0),
        Span(1, "a", "score", 5.0, 5.25),
    ]
    parts = load_bench().parts_of_step(spans, next_start=10.0)
    assert parts["generation"] == 3.0
    assert parts["search wait"] == 1.0
    assert parts["reward"] == 0.25
    assert parts["rollout, rest"] == 1.75
    assert parts["teacher"] == 0.5
    assert parts["initial policy"] == 0.5
    assert parts["update actor"] == 2.0
    assert parts["rest"] == 1.0
    assert sum(value for name, value in parts.items() if name != "step") == pytest.approx(parts["step"])
