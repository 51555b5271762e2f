"""Many clients at once, overload, and a replica that is killed: no answer is lost, swapped or wrong."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, get, started_server

from dgpo.agent.search import SearchClient
from retriever.build import build_indexes

NUM_PASSAGES = 300


def run_stress(data: Path, *arguments: str) -> dict[str, float]:
    """`scripts/bench/retriever_stress.py`, which fails on an error, a wrong answer, a leak or an unbounded queue."""
    command = [sys.executable, "scripts/bench/retriever_stress.py", "--data", str(data), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_512_clients_get_their_own_answers_and_overload_is_refused(tmp_path: Path) -> None:
    # In a few seconds memory does not settle; the slow test says whether it does.
    short = ["--seconds", "5", "--overload-s", "2", "--num-passages", "2000", "--max-growth", "0.5"]
    report = run_stress(tmp_path, *short)
    assert report["clients"] == 512
    assert report["requests"] > 512


@pytest.mark.slow
def test_512_clients_for_a_minute(tmp_path: Path) -> None:
    run_stress(tmp_path, "--seconds", "60", "--overload-s", "15")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BM25 index in which `passage w<n>` finds passage n."""
    root = tmp_path_factory.mktemp("numbered")
    rows = [{"id": str(row), "contents": f'"Passage {row}"\nword w{row}'} for row in range(NUM_PASSAGES)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_indexes({"numbered": root / "corpus.jsonl"}, root / "indexes", method="bm25")["numbered"]


async def search_until(client: SearchClient, deadline: float, worker: int) -> int:
    """Search one passage after another and check each answer; the number of searches."""
    num_searches = 0
    while time.monotonic() < deadline:
        number = (worker * 37 + num_searches * 11) % NUM_PASSAGES
        (document,) = await client.search(f"w{number}", topk=1, corpus=None)
        assert document["id"] == str(number)
        num_searches += 1
    return num_searches


async def test_a_replica_killed_under_load_loses_no_search(numbered: Path, tmp_path: Path) -> None:
    with (
        started_server(tmp_path / "a", f"--index={numbered}", "--cache-mb=0") as left,
        started_server(tmp_path / "b", f"--index={numbered}", "--cache-mb=0") as right,
    ):
        options = {"timeout_s": 20.0, "max_retries": 4, "max_concurrency": 64, "max_queries_per_request": 8}
        async with SearchClient(f"{left.url},{right.url}", **options) as client:
            deadline = time.monotonic() + 4
            workers = [asyncio.create_task(search_until(client, deadline, worker)) for worker in range(64)]
            await asyncio.sleep(1.5)
            left.process.send_signal(signal.SIGKILL)
            num_searches = sum(await asyncio.gather(*workers))
            assert num_searches > 64
            assert client.num_failed == 0
            assert client.num_retries > 0
        assert get(right.url + "/ready").status == 200
