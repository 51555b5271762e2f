"""Every stage on a Ray cluster of two nodes, both on this machine, given paths relative to a folder that is not the
nodes' own: the same episodes, losses and scores as on one node.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from dgpo.agent.trajectory import read_trajectories
from dgpo.engines.ray_cluster import forget_token, use_token
from tests.conftest import ROOT, TinyWorld, read_metrics
from tests.engine.same_run import repeatable

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NODE = {"num_cpus": 16, "num_gpus": 1, "object_store_memory": 300_000_000, "include_dashboard": False}
SMALL = [
    "collect.max_questions=64",
    "distill.max_steps=12",
    "distill.evaluate_every=6",
    "train.num_steps=2",
    "train.batch_size=8",
    "train.mini_batch_size=8",
    "train.generation_concurrency=1",
    "hardware.micro_batch_size=4",
    "test.max_questions=32",
]
ONE_NODE = ["hardware.num_nodes=1", "hardware.gpus_per_node=2"]
TWO_NODES = ["hardware.num_nodes=2", "hardware.gpus_per_node=1"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a cluster of two nodes; its token is in the environment."""
    folder = tmp_path_factory.mktemp("ray")
    use_token(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")  # the nodes' working directory
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        cluster.add_node(**NODE)
        yield cluster.address
        cluster.shutdown()
    forget_token(folder)


def run(stage: str, world: TinyWorld, run_dir: Path, hardware: list[str], *, address: str | None = None) -> None:
    """A stage from the world's folder, its models and files as relative paths."""
    given = [override.replace(f"={world.folder}/", "=") for override in [*world.overrides(run_dir), *SMALL, *hardware]]
    given += ["data.test_files.real=data/test.parquet", f"test.models.dgpo={world.student.relative_to(world.folder)}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    if address:
        environment = os.environ | {"RAY_ADDRESS": address}
    result = subprocess.run(
        [sys.executable, "-m", "dgpo", stage, *given],
        cwd=world.folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.fixture(scope="module")
def run_dirs(tiny_world, address, tmp_path_factory):
    """The stages on one node and on two."""
    folder = tmp_path_factory.mktemp("nodes")
    for stage in ("collect", "distill", "train", "test"):
        run(stage, tiny_world, folder / "one", ONE_NODE)
        run(stage, tiny_world, folder / "two", TWO_NODES, address=address)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("file", ["collect/trajectories.jsonl", "test/dgpo/trajectories.jsonl"])
def test_two_engines_play_the_episodes_of_one(run_dirs, file):
    one, two = ([(t.episode_id, t.response_ids) for t in read_trajectories(folder / file)] for folder in run_dirs)
    assert two == one


def test_distillation_makes_the_same_losses(run_dirs):
    one, two = (
        [line.get("loss", line.get("held_out_loss")) for line in read_metrics(folder / "distill" / "metrics.jsonl")]
        for folder in run_dirs
    )
    assert two == pytest.approx(one, abs=1e-5)


def test_training_makes_the_same_metrics_and_each_node_saves_its_shard(run_dirs):
    one, two = (repeatable(folder / "train") for folder in run_dirs)
    assert [record["step"] for record in two] == [1, 2]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    shards = sorted(path.name for path in (run_dirs[1] / "train" / "checkpoints").rglob("model_world_size_2_rank_*.pt"))
    assert set(shards) == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}


def test_no_token_of_the_runs_own_is_made_where_a_cluster_is_named(run_dirs):
    assert not list(run_dirs[1].rglob("ray_token"))
