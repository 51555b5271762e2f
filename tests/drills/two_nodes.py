"""A drill of RL on two Ray nodes, both on this machine: one is lost, and another takes its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgpo.engines.ray_cluster import use_token
from tests.drills.processes import kill
from tests.drills.report import Outcome
from tests.drills.training import NUM_EPISODES, START_BOUND_S, Fault, TrainingRun, check_records, told
from tests.drills.world import World

NODE = {"num_cpus": 16, "num_gpus": 1, "object_store_memory": 300_000_000, "include_dashboard": False}
NUM_STEPS = 6
OVERRIDES = ["hardware.num_nodes=2", "hardware.gpus_per_node=1", f"hardware.micro_batch_size={NUM_EPISODES // 2}"]
OVERRIDES += ["train.max_restarts=0", f"train.num_steps={NUM_STEPS}"]
LOST = Fault("Ray node", "raylet", "its node is gone", bound_s=120.0)  # Ray misses a node after half a minute


@contextlib.contextmanager
def cluster(out: Path) -> Iterator[Any]:
    """Ray's own cluster of several nodes on one machine; its address and token are in the environment meanwhile."""
    before = dict(os.environ)
    use_token(out)
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        os.environ["RAY_ADDRESS"] = nodes.address
        yield nodes
    finally:
        nodes.shutdown()
        os.environ.clear()
        os.environ.update(before)


def drill(world: World, out: Path) -> Iterator[Outcome]:
    """kill -9 of the raylet of the second node in the middle of a step."""
    out.mkdir(parents=True, exist_ok=True)
    with cluster(out) as nodes:
        run = TrainingRun(out / "run", world.overrides, logs=out)
        try:
            (raylet,) = nodes.add_node(**NODE).all_processes["raylet"]
            run.start(*OVERRIDES)
            run.wait_until_it_works()
            kill(raylet.process.pid)
            seconds = run.wait_for_end(code=1, bound_s=LOST.bound_s)
            message = told(run, LOST)
            nodes.add_node(**NODE)
            run.start(*OVERRIDES)
            run.wait_for_end(code=0, bound_s=START_BOUND_S)
            lost = check_records(run, num_steps=NUM_STEPS)
            yield Outcome(LOST.name, "stopped; resumed with another node", seconds, message, lost)
        finally:
            run.end()
