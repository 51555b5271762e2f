"""The teacher behind vLLM's own server of OpenAI's API: greedy, it plays the episodes that it plays in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dgpo.agent.trajectory import read_trajectories
from dgpo.config.load import load_config
from tests.conftest import ROOT, TinyWorld, run_command
from tests.drills.processes import free_port
from tests.engine.killing import kill_all, start, wait_until

pytestmark = pytest.mark.engine

HARDWARE = load_config(["world=tiny", "hardware=cpu"]).hardware
NUM_QUESTIONS = 24
START_S = 180


@contextmanager
def served(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    engine = HARDWARE.engine
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "teacher", "--dtype", engine.dtype, "--enforce-eager"]
    command += ["--max-num-seqs", str(engine.max_num_seqs), "--max-model-len", "640", "--no-enable-chunked-prefill"]
    environment = {**os.environ, **{name: str(value) for name, value in HARDWARE.env.items()}}
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not answers(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield process
    finally:
        if process.poll() is None:
            kill_all(process)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def episodes(run: Path) -> dict[str, tuple[object, ...]]:
    played = list(read_trajectories(run / "collect" / "trajectories.jsonl"))
    assert len({each.episode_id for each in played}) == len(played) == NUM_QUESTIONS
    return {t.episode_id: (t.answer, t.status, [search.query for search in t.searches]) for t in played}


def tokens(run: Path) -> dict[str, list[int]]:
    return {t.episode_id: t.response_ids for t in read_trajectories(run / "collect" / "trajectories.jsonl")}


def test_a_teacher_behind_http_plays_its_own_episodes_and_a_killed_server_loses_none(
    tiny_world: TinyWorld, tmp_path: Path
):
    port, greedy = free_port(), [f"collect.max_questions={NUM_QUESTIONS}", "collect.temperature=0"]

    def command(name: str, *more: str) -> list[str]:
        return ["collect", *tiny_world.overrides(tmp_path / name), *greedy, *more]

    server = [f"teacher.url=http://127.0.0.1:{port}/v1", "teacher.url_max_retries=1", "teacher.url_concurrency=2"]
    log = tmp_path / "server.log"
    assert run_command("-m", "dgpo", *command("inside")).returncode == 0
    with served(tiny_world.folder / "models" / "teacher", port, log) as process:
        result = run_command("-m", "dgpo", *command("ids", *server, "teacher.url_ids=true"))
        assert result.returncode == 0, result.stderr[-3000:]
        collecting = start(command("text", *server), tmp_path / "log")
        partial = tmp_path / "text" / "collect" / "trajectories.jsonl.partial"
        wait_until(collecting, lambda: partial.exists() and partial.read_bytes().count(b"\n") >= NUM_QUESTIONS // 3)
        kill_all(process)
        assert collecting.wait(timeout=120) == 1, (tmp_path / "log").read_text()[-3000:]
    kept = partial.read_text().splitlines()
    assert NUM_QUESTIONS // 3 <= len(kept) < NUM_QUESTIONS
    with served(tiny_world.folder / "models" / "teacher", port, log):
        result = run_command("-m", "dgpo", *command("text", *server, "resume=true"))
        assert result.returncode == 0, result.stderr[-3000:]
    assert tokens(tmp_path / "ids") == tokens(tmp_path / "inside"), "ids in, ids out"
    assert episodes(tmp_path / "text") == episodes(tmp_path / "inside"), "as text: the same turns"
    assert set(kept) <= set((tmp_path / "text" / "collect" / "trajectories.jsonl").read_text().splitlines())
