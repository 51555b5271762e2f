"""Public files as they are published: question sets through `prepare`, Search-R1's transcripts through the loop.

`DGPO_REALDATA` names a folder with `flashrag/<set>/<split>.jsonl.gz` and `search_r1_episodes.jsonl.gz`; without it
these tests are skipped.
"""

import asyncio
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from dgpo.agent.episode import run_episode
from dgpo.agent.protocol import INVALID_ACTION_TEXT, STOP_STRINGS
from dgpo.config.load import load_config
from dgpo.data.benchmarks import BENCHMARKS
from dgpo.data.prepare import prepare
from dgpo.data.rows import read_rows
from dgpo.metrics.exact_match import exact_match
from tests.unit.scripted import PROMPT_IDS, ByteTokenizer, RecordingSearch, ScriptedPolicy, make_limits

FOLDER = os.environ.get("DGPO_REALDATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="DGPO_REALDATA names no folder of public files")
# What the environment wrote: search results, closed or not, and the text on invalid actions.
ENVIRONMENT = re.compile(
    rf"\s*<information>.*?(?:</information>|(?=<search>|<answer>|<think>|\Z))\s*|{re.escape(INVALID_ACTION_TEXT.strip())}",
    re.DOTALL,
)
UNCHANGED = ("nq", "triviaqa", "bamboogle")


def test_the_published_sets_become_rows_and_missing_evidence_is_said(tmp_path, capsys):
    sets = [name for name in BENCHMARKS if name != "popqa"]
    config = load_config([f"prepare.benchmarks={FOLDER}/flashrag", f"prepare.out={tmp_path / 'out'}"])
    config.prepare.test_sets, config.prepare.train_sets = sets, []
    prepare(config)
    printed = capsys.readouterr().out
    for name in sets:
        rows = read_rows(tmp_path / "out" / f"{name}_test.parquet")
        assert len(rows) == BENCHMARKS[name].num_test
        given = any(row["extra_info"].get("gold_passages") for row in rows)
        expected = BENCHMARKS[name].has_evidence or name == "nq"
        assert (f"no question of {name} has gold passages" in printed) == (expected and not given)


@pytest.mark.parametrize("name", UNCHANGED)
def test_the_pinned_digests_are_those_of_the_files(name):
    path = Path(FOLDER or "") / "flashrag" / f"{BENCHMARKS[name].file(name)}.gz"
    assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == BENCHMARKS[name].sha256


def test_search_r1s_transcripts_keep_their_scores_through_parser_masks_and_exact_match():
    with gzip.open(Path(FOLDER or "") / "search_r1_episodes.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    assert len(records) > 4000
    for record in records:
        turns = ENVIRONMENT.split(record["response"])
        if not "".join(turns):  # nothing but an observation was kept of it
            assert record["metric_score"]["em"] == 0
            continue
        trajectory = asyncio.run(replay(turns))
        em = float(trajectory.answer is not None and exact_match(trajectory.answer, record["golden_answers"]))
        assert em == record["metric_score"]["em"], record["id"]
        written = bytes(
            i for i, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if mask
        ).decode()
        assert "<information>" not in written
        assert written == "".join(map(until_stop, turns[: len(trajectory.turns)]))


def until_stop(turn):
    """A turn as an engine with our stop strings ends it."""
    ends = [turn.index(tag) + len(tag) for tag in STOP_STRINGS if tag in turn]
    return turn[: min(ends, default=len(turn))]


async def replay(turns):
    return await run_episode(
        episode_id="e",
        prompt_ids=PROMPT_IDS,
        policy=ScriptedPolicy(turns),
        search=RecordingSearch(),
        tokenizer=ByteTokenizer(),
        limits=make_limits(max_turns=max(len(turns) - 1, 1), max_turn_tokens=100_000, max_response_tokens=1_000_000),
        max_turns=len(turns) - 1,
    )
