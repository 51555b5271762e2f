"""Data-parallel ranks on 1..N nodes: one Ray actor per GPU, in the environment that torch.distributed reads.

Plain actors, as veRL's own: Ray Train would add its controller, a storage folder and packages that our locks do not ask
for, to set the same six variables.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgpo.config.schema import Config
from dgpo.config.stages import with_absolute_paths
from dgpo.engines import ray_cluster
from dgpo.errors import ConfigError, DgpoError, one_line
from dgpo.runs.stopping import stop_file_on_signal

RESOURCES_TIMEOUT_S = 60.0
START_TIMEOUT_S = 300.0  # until a rank's process has imported what it needs
OBJECT_STORE_GB = 0.2  # where we start Ray ourselves: only settings and counts travel


def run_on_ranks(work: Callable[..., Any], config: Config, *, folder: Path) -> Any:
    """`work(config, rank=, num_ranks=)` on every rank; in this process, without Ray, where there is but one.

    `run_dir` and the models must be there under the same paths on every node. A request to stop is a file in `folder`
    (`dgpo.runs.stopping`), which `work` looks for.

    Args:
        work: a module's own function.
        folder: of the stage, on every node.

    Returns:
        What rank 0 returned.

    Raises:
        ConfigError: the cluster has fewer GPUs than configured.
        DgpoError: the process of a rank died.
        Exception: what `work` raised, of the first rank that failed; the others are ended.
    """
    num_ranks = config.hardware.num_gpus
    if num_ranks == 1:
        if config.hardware.platform != "cpu":
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Hugging Face's Trainer would take all that it sees
        with stop_file_on_signal(folder):
            return work(config, rank=0, num_ranks=1)
    config = with_absolute_paths(config)
    try:
        ray_cluster.connect(config.hardware, token_folder=folder, object_store_gb=OBJECT_STORE_GB)
        with stop_file_on_signal(folder):  # after Ray's start, which sets a handler of its own
            return _run(work, config, num_ranks)
    finally:
        ray_cluster.disconnect(folder)


def _run(work: Callable[..., Any], config: Config, num_ranks: int) -> Any:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    hardware = config.hardware
    names = ("CPU",) if hardware.platform == "cpu" else ("CPU", "GPU")
    node = dict.fromkeys(names, float(hardware.gpus_per_node))
    group = placement_group([node] * hardware.num_nodes, strategy="STRICT_SPREAD")
    if not group.wait(RESOURCES_TIMEOUT_S):
        there = [{name: n["Resources"].get(name, 0.0) for name in names} for n in ray.nodes() if n["Alive"]]
        raise ConfigError(
            f"hardware.num_nodes={hardware.num_nodes} with hardware.gpus_per_node={hardware.gpus_per_node} needs "
            f"{node} on each node, but Ray's nodes have {there}: lower them, or set RAY_ADDRESS to a larger cluster"
        )
    rank_class = ray.remote(num_cpus=1, num_gpus=int("GPU" in names))(_Rank)
    ranks = [
        rank_class.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank // hardware.gpus_per_node
            )
        ).remote()
        for rank in range(num_ranks)
    ]
    address, port = ray.get(ranks[0].free_address.remote(), timeout=START_TIMEOUT_S)
    pending = [
        actor.run.remote(work, config, rank=rank, num_ranks=num_ranks, address=address, port=port)
        for rank, actor in enumerate(ranks)
    ]
    first = pending[0]
    try:
        while pending:  # one that failed is seen at once, though the others wait for it
            done, pending = ray.wait(pending)
            ray.get(done)
        return ray.get(first)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise DgpoError(f"a rank died ({one_line(error)}); resume=true continues") from error
    finally:
        for actor in ranks:
            ray.kill(actor)


class _Rank:
    def free_address(self) -> tuple[str, int]:
        """An address of this rank's node at which the others meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(
        self, work: Callable[..., Any], config: Config, *, rank: int, num_ranks: int, address: str, port: int
    ) -> Any:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            LOCAL_RANK="0",  # Ray shows each actor its own GPU only
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        return work(config, rank=rank, num_ranks=num_ranks)
