"""One command serves replicas, and shards, on Ray; a server that dies comes back."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import QUESTIONS, ROOT, get, post

from retriever.deploy import missing_resources, parse_plan
from retriever.split import split_folder

# A Ray of its own, which on a busy machine may take minutes to start.
ENVIRONMENT = os.environ | {"RAY_ADDRESS": "", "RAY_raylet_start_wait_time_s": "300"}


def test_ports_and_arguments_of_a_plan_differ_by_replica_and_shard() -> None:
    command = ["--replicas", "2", "--shards", "3", "--index", "a=x/{shard}", "--port", "9000", "--max-topk", "7"]
    plan, _ = parse_plan(command)
    assert plan.arguments(2) == ["--index", "a=x/2", "--max-topk", "7"]
    ports = [plan.port + replica for replica in range(2)]
    ports += [plan.shard_port(replica, shard) for replica in range(2) for shard in range(3)]
    assert ports == list(range(9000, 9008))
    assert plan.options.limits.max_topk == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0", "--index", "a=x"], "--replicas 0"),
        (["--shards", "1", "--index", "a=x/{shard}"], "--shards 1"),
        (["--shards", "2", "--index", "a=x"], "needs {shard}"),
        (["--index", "a=x", "--host", "0.0.0.0"], "--host is set by retriever.deploy"),
        (["--index", "a=x", "--max-topk", "0"], "max_topk is 0"),
        ([], "either --index"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_ray_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_plan(arguments)


def test_a_cluster_that_is_too_small_is_told() -> None:
    plan, _ = parse_plan(["--replicas", "2", "--shards", "3", "--index", "a=x/{shard}", "--num-threads", "4"])
    assert missing_resources(plan, {"CPU": 24}) is None
    assert missing_resources(plan, {"CPU": 16}) == "16 of 24 CPUs"
    plan, _ = parse_plan(["--replicas", "2", "--index", "a=x", "--device", "cuda"])
    assert missing_resources(plan, {"CPU": 8, "GPU": 1}) == "8 of 2 CPUs and 1 of 2 GPUs"
    assert missing_resources(plan, {"CPU": 8, "GPU": 2}) is None


@contextmanager
def deployed(folder: Path, *arguments: str) -> Iterator[list[str]]:
    """`python -m retriever.deploy` on a Ray of its own: the URLs of its replicas."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    urls_file = folder / "urls"
    options = ["--address", "local", "--port", str(port), "--urls-file", str(urls_file), "--log-folder", str(folder)]
    command = [sys.executable, "-m", "retriever.deploy", *options, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    try:
        wait_until(lambda: urls_file.exists() or process.poll() is not None, 400)
        assert process.poll() is None
        yield urls_file.read_text().strip().split(",")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def server_pids(url: str) -> list[int]:
    """Server processes with this port in their command line."""
    port = url.rsplit(":", 1)[1]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "retriever.serve" in command and command[-1] == port:
            found.append(process.pid)
    return found


def is_ready(url: str) -> bool:
    try:
        return get(url + "/ready").status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_replicas_answer_and_a_killed_one_comes_back(indexes: dict[str, Path], tmp_path: Path) -> None:
    with deployed(tmp_path, "--replicas", "2", "--index", f"words={indexes['words']}") as urls:
        assert len(urls) == 2
        first, second = (post(url + "/retrieve", {"query": "planet rings", "topk": 1}).json for url in urls)
        assert first == second
        (pid,) = server_pids(urls[0])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_ready(urls[0]), 20)
        assert is_ready(urls[1])
        wait_until(lambda: is_ready(urls[0]), 200)
        assert server_pids(urls[0]) != [pid]
        assert post(urls[0] + "/retrieve", {"query": "planet rings", "topk": 1}).json == first
    assert not any(server_pids(url) for url in urls)


@pytest.mark.slow
def test_shards_answer_as_one(indexes: dict[str, Path], tmp_path: Path) -> None:
    split_folder(indexes["facts"], tmp_path / "shards", 2)
    arguments = ["--replicas", "1", "--shards", "2", "--index", f"facts={tmp_path / 'shards'}/{{shard}}"]
    with deployed(tmp_path, *arguments) as (url,):
        answer = post(url + "/retrieve", {"queries": list(QUESTIONS), "topk": 1}).json["result"]
        titles = [documents[0]["contents"].split("\n")[0].strip('"') for documents in answer]
        assert titles == list(QUESTIONS.values())
        assert get(url + "/info").json["corpora"]["facts"]["count"] == 12


@pytest.mark.slow
def test_a_server_that_cannot_start_ends_the_deployment_with_its_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retriever.deploy", "--address", "local", "--log-folder", str(tmp_path)]
    run = subprocess.run(
        [*command, "--index", "a=missing", "--port", "0"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 1
    assert "missing is not an index folder" in run.stderr
