"""The nearest setting that fits: the fewest overrides, and of these the mildest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

from dgpo.config.load import spelt
from dgpo.config.schema import Config
from dgpo.hardware.budget import Budget, Models
from dgpo.hardware.stages import PLAYING, stage_budget

MAX_OVERRIDES = 3
Change = tuple[str, Any]  # config key, value


def nearest_fit(
    config: Config, stage: str, models: Models, *, is_valid: Callable[[Config], bool] = lambda _: True
) -> list[str] | None:
    """Overrides that make the stage fit; None if none of those tried does.

    Args:
        is_valid: whether the checks of the configuration let a changed one pass.
    """

    def fits(changes: Sequence[Change]) -> bool:
        changed = changed_config(config, changes)
        return stage_budget(changed, stage, models).problem is None and is_valid(changed)

    same_gpus = _options(config, stage, models)
    for options in (same_gpus, [*same_gpus, *_more_gpus(config)]):
        for number in range(1, MAX_OVERRIDES + 1):
            for chosen in combinations(options, number):
                for changes in product(*chosen):
                    if fits(changes):
                        return [f"{key}={spelt(value)}" for key, value in changes]
    return None


def changed_config(config: Config, changes: Sequence[Change]) -> Config:
    """A copy with other values."""
    config = copy.deepcopy(config)
    for key, value in changes:
        *sections, name = key.split(".")
        owner: Any = config
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, name, value)
    return config


def _options(config: Config, stage: str, models: Models) -> list[list[Change]]:
    """Keys in the order in which changing them costs little; of each, the values from mild to strong."""
    hardware, engine = config.hardware, config.hardware.engine
    values: dict[str, list[Any]] = {}
    if stage == "train":
        longest = -(-config.episode.max_tokens // hardware.ulysses_size)
        if hardware.max_tokens_per_gpu:
            values["hardware.max_tokens_per_gpu"] = list(_halves(hardware.max_tokens_per_gpu, longest))
        else:
            values["hardware.micro_batch_size"] = list(_halves(hardware.micro_batch_size, 1))
        values["hardware.weight_bucket_mb"] = [mb for mb in (1024, 512, 256) if mb < hardware.weight_bucket_mb]
    if stage == "distill":
        size = config.distill.micro_batch_size or hardware.micro_batch_size
        values["distill.micro_batch_size"] = list(_halves(size, 1))
    if stage in ("train", "distill") and not hardware.gradient_checkpointing:
        values["hardware.gradient_checkpointing"] = [True]
    if stage != "distill" or config.distill.loss == "distillm":
        key = "gpu_memory_utilization_alone" if stage in PLAYING else "gpu_memory_utilization"
        now = getattr(engine, key)
        shares = sorted((s / 100 for s in range(10, 95, 5)), key=lambda share: abs(share - now))
        values[f"hardware.engine.{key}"] = [share for share in shares if share != now]
    if stage == "train":
        if hardware.fsdp_size:
            values["hardware.fsdp_size"] = [None]
        values["hardware.offload"] = {"none": ["idle", "full"], "idle": ["full"]}.get(hardware.offload, [])
    if stage == "distill" and config.distill.sharding == "none" and hardware.num_gpus > 1:
        values["distill.sharding"] = ["full"]
    if stage != "distill":
        heads = models.student.heads
        sizes = [n for n in (2, 4, 8) if heads % n == 0 and hardware.gpus_per_node % n == 0]
        values["hardware.engine.tensor_parallel_size"] = [n for n in sizes if n > engine.tensor_parallel_size]
    return _changes(values)


def _more_gpus(config: Config) -> list[list[Change]]:
    hardware = config.hardware
    counts = {"hardware.gpus_per_node": hardware.gpus_per_node, "hardware.num_nodes": hardware.num_nodes}
    return _changes({key: [n for n in (2, 4, 8) if n > count] for key, count in counts.items()})


def _changes(values: dict[str, list[Any]]) -> list[list[Change]]:
    return [[(key, value) for value in choices] for key, choices in values.items() if choices]


def _halves(value: int, smallest: int) -> Iterator[int]:
    while value > smallest:
        value = max(smallest, value // 2)
        yield value


def explain(budget: Budget, overrides: Sequence[str] | None) -> str:
    """One line: what does not fit, and what to do."""
    if overrides is None:
        return f"{budget.problem}, and no setting tried makes it fit: take more or larger GPUs, or a smaller model"
    return f"{budget.problem}; the nearest setting that fits: {' '.join(overrides)}"
