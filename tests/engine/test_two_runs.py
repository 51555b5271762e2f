"""Two RL runs on one machine: neither takes the other's weights, socket, shared memory or cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgpo.config.load import load_config
from dgpo.engines.environment import export_environment
from dgpo.runs.processes import mark, run_tag
from dgpo.runs.remains import remove_remains
from tests.conftest import ROOT, TinyWorld, run_command
from tests.engine.same_run import assert_same_run
from tests.engine.test_train import REPEATABLE, SMALL

pytestmark = pytest.mark.engine

RAY_JOB = "01000000"  # of the first job in any Ray


@pytest.fixture
def verl():
    """veRL's weight sync, on the CPU's platform."""
    export_environment(load_config(["world=tiny", "hardware=cpu"]).hardware)
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, utils

    return SimpleNamespace(
        Receiver=bucketed_weight_transfer.BucketedWeightReceiver, Extension=utils.vLLMColocateWorkerExtension
    )


def sender_and_receiver(verl, folder: Path, monkeypatch):
    """The two ends of the run in `folder`, as its trainer and its engine make them."""
    import torch

    from dgpo.rl.weight_sync import JOB, TaggedSender, tag_receiver

    monkeypatch.setenv("DGPO_RUN", mark(folder)["DGPO_RUN"])
    monkeypatch.setenv("VERL_REPLICA_RANK", "0")
    monkeypatch.setenv(JOB, RAY_JOB)
    # As veRL's trainer names it (`vllm_rollout.py`).
    sender = TaggedSender(f"ipc:///tmp/rl-colocate-zmq-{RAY_JOB}-replica-0-rank-0.sock", bucket_size_mb=1, use_shm=True)
    tag_receiver()
    worker = SimpleNamespace(model_runner=None, local_rank=0)
    handle = verl.Extension._get_zmq_handle(worker)
    assert handle == sender.zmq_handle
    assert run_tag() in handle
    return sender, verl.Receiver(handle, torch.device("cpu"), use_shm=True)


def test_two_runs_with_one_ray_job_id_send_to_their_own_engine(verl, tmp_path, monkeypatch):
    """veRL's sender and receiver, both pairs at once; with one name, a receiver takes whichever sender comes first."""
    import torch

    pairs = {run: sender_and_receiver(verl, tmp_path / run, monkeypatch) for run in ("a", "b")}
    values = {"a": 1.0, "b": 2.0}
    assert pairs["a"][0].zmq_handle != pairs["b"][0].zmq_handle
    received: dict[str, list[float]] = {run: [] for run in pairs}

    def receive(run):
        pairs[run][1].receive_weights(lambda weights, _: received[run].extend(float(w.sum()) for _, w in weights))

    def send(run):
        tensor = torch.tensor([values[run]])
        asyncio.run(pairs[run][0].async_send_weights(iter([("w", tensor)])))

    threads = [threading.Thread(target=work, args=(run,), daemon=True) for run in pairs for work in (receive, send)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a sender or a receiver waits for ever"
    assert received == {run: [value] for run, value in values.items()}


def test_only_the_runs_own_remains_are_removed(verl, tmp_path, monkeypatch):
    sender, _ = sender_and_receiver(verl, tmp_path / "other", monkeypatch)
    sender._init_socket()
    left = Path(sender.zmq_handle.removeprefix("ipc://"))
    monkeypatch.setenv("DGPO_RUN", mark(tmp_path / "ours")["DGPO_RUN"])
    ours = Path(f"/dev/shm/verl_weights_{run_tag()}_0")
    theirs = Path("/dev/shm/verl_weights_000000000000_0")
    try:
        for segment in (ours, theirs):
            segment.touch()  # no process maps them, as between their making and their use
        assert remove_remains() == 1
        assert theirs.exists()
        assert not ours.exists()
        assert left.exists()
        monkeypatch.setenv("DGPO_RUN", mark(tmp_path / "other")["DGPO_RUN"])
        assert remove_remains() == 1
        assert not left.exists()
    finally:
        theirs.unlink()
        sender._cleanup()


CLAIM_TWICE = """
import sys
from pathlib import Path
from dgpo.config.load import load_config
from dgpo.engines import ray_cluster
from dgpo.errors import ConfigError

ray_cluster.CLAIM_TIMEOUT_S = 0.0
folder = Path(sys.argv[1])
ray_cluster.connect(load_config(["world=tiny", "hardware=cpu"]).hardware, token_folder=folder, object_store_gb=0.1)
ray_cluster.claim()
try:
    ray_cluster.claim()
except ConfigError as error:
    print(error)
ray_cluster.disconnect(folder)
"""


def test_a_second_run_in_one_ray_cluster_is_refused(tmp_path):
    result = run_command("-c", CLAIM_TWICE, str(tmp_path))
    assert "another run trains in the Ray cluster" in result.stdout, result.stderr[-2000:]


def start_run(world: TinyWorld, run_dir: Path, *, barrier: Path, num_runs: int) -> subprocess.Popen[str]:
    barrier.mkdir(parents=True, exist_ok=True)
    arguments = [
        *world.overrides(run_dir),
        *SMALL,
        *REPEATABLE,
        f"seed={1 if run_dir.name == 'a' else 2}",
        "train.limits.sync_s=400",
        "train.max_restarts=0",
        "hardware.env.VERL_USE_EXTERNAL_MODULES='dgpo.platforms.cpu,tests.engine.sync_barrier'",
        f"+hardware.env.SYNC_BARRIER={barrier}",
        f"+hardware.env.SYNC_RUNS='{num_runs}'",
    ]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}.log").open("w")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "dgpo", "train", *arguments], cwd=ROOT, stdout=log, stderr=log, env=environment
    )


@pytest.mark.slow
def test_two_runs_at_once_end_with_the_weights_that_each_has_alone(tiny_world: TinyWorld, tmp_path: Path):
    """Held at every weight sync until the other is there too, and compared to the last bit."""
    for run in ("a", "b"):
        assert start_run(tiny_world, tmp_path / "alone" / run, barrier=tmp_path / run, num_runs=1).wait(400) == 0
    both = [
        start_run(tiny_world, tmp_path / "together" / run, barrier=tmp_path / "barrier", num_runs=2)
        for run in ("a", "b")
    ]
    try:
        codes = [process.wait(800) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], [path.read_text()[-2000:] for path in (tmp_path / "together").glob("*.log")]
    assert len(list((tmp_path / "barrier").iterdir())) >= 2 * 5
    for run in ("a", "b"):
        assert_same_run(tmp_path / "together" / run / "train", tmp_path / "alone" / run / "train")
