"""Rows that name themselves badly, or not at all, still sample with seeds of their own in training."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from dgpo.config.load import load_config
from dgpo.engines.environment import export_environment

pytestmark = pytest.mark.engine

BADLY_NAMED = [
    {"index": 0},
    {"index": 0},  # missing, of another source
    {"id": None, "index": 1},
    {"id": None, "index": 2},
    {"id": "", "index": 3},
    {"id": "a", "index": 4},
    {"id": "a", "index": 5},
    {"id": 1, "index": 6},
    {"id": "1", "index": 7},
]


def test_no_two_rows_of_a_batch_share_a_seed(monkeypatch):
    config = load_config(["hardware=cpu", "world=tiny"])
    export_environment(config.hardware)
    from dgpo.rl import agent_loop

    seeds = []

    async def record(**arguments):
        seeds.append(arguments["seed"])
        raise RuntimeError("not played")

    monkeypatch.setattr(agent_loop, "run_episode", record)
    monkeypatch.setattr(agent_loop, "encode_prompt", lambda *_: [1])
    settings = {"episode": asdict(config.episode), "retriever": asdict(config.retriever), "reward": None}
    loop = agent_loop.SearchAgentLoop(
        server_manager=None,
        tokenizer=SimpleNamespace(eos_token_id=0),
        settings=json.dumps({**settings, "seed": 1, "request_seeds": True, "concurrency": None}),
    )

    async def play() -> None:
        for row, info in enumerate(BADLY_NAMED):
            for session in range(2):
                await loop.run(
                    {},
                    extra_info=info,
                    raw_prompt=[],
                    uid=f"0000001-{row:06d}",
                    global_steps=1,
                    session_id=session,
                )

    asyncio.run(play())
    assert len(set(seeds)) == len(seeds) == 2 * len(BADLY_NAMED)
