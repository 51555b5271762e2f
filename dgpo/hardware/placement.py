"""Which role runs where: replicas of the engine, shards of the trained models, processes without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dgpo.config.schema import Config


@dataclass(frozen=True)
class Placement:
    """Where the processes of a stage lie."""

    nodes: int
    gpus: int  # per node
    replicas: list[list[int]]  # each of the engine's: its GPUs, numbered over all nodes
    shards: int  # GPUs that hold one copy of a trained model; 0: nothing is trained
    copies: int  # how many such groups there are


def place(config: Config, stage: str) -> Placement:
    """As veRL and Ray will do it: replicas take consecutive GPUs and never span nodes (checked), shards likewise."""
    hardware = config.hardware
    world = hardware.num_gpus
    size = hardware.engine.tensor_parallel_size
    engines = [list(range(start, start + size)) for start in range(0, world - size + 1, size)]
    if stage == "train":
        shards = hardware.num_shards
        return Placement(hardware.num_nodes, hardware.gpus_per_node, engines, shards, world // shards)
    if stage == "distill":
        shards = world if config.distill.sharding == "full" else 1
        replicas = [[gpu] for gpu in range(world)] if config.distill.loss == "distillm" else []
        return Placement(hardware.num_nodes, hardware.gpus_per_node, replicas, shards, world // shards)
    return Placement(hardware.num_nodes, hardware.gpus_per_node, engines[:1] if stage == "ask" else engines, 0, 0)


def ranges(numbers: list[int]) -> str:
    """0-7 for consecutive numbers."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
