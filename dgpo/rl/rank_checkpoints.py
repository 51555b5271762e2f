"""One rank's part of a checkpoint: which files it wrote, and how it loads what another number of ranks wrote.

veRL's FSDP checkpoints hold one file per rank, and veRL loads them with as many ranks only. Parameters and optimiser
state are sharded along their first dimension, so that any number of ranks can cut its own parts out of the whole.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dgpo.errors import DataError
from dgpo.models.shards import load_shards, saved_world_sizes, shard_paths, whole_tensor
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.checkpoints import FileEntries, file_entries

_RANK = re.compile(r"_rank_(\d+)\.pt$")


def _check_content(folder: Path, rank: int) -> None:
    """Whoever can write to a run's folder must not run code in it: veRL would unpickle whatever the files hold.

    Raises:
        DataError: a file holds more than tensors and plain values.
    """
    for kind in ("model", "optim", "extra_state"):
        paths = shard_paths(folder, kind)
        load_shards([paths[min(rank, len(paths) - 1)]])


def rank_entries(folder: str, *, rank: int) -> FileEntries:
    """Entries of the files that a rank wrote: its shards, and on rank 0 what all share.

    Made where the bytes still are in memory, by all ranks at once, and not by one process over a network.
    """
    names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    writers = {name: int(match[1]) if (match := _RANK.search(name)) else 0 for name in names if name != MANIFEST}
    return file_entries(Path(folder), [name for name, writer in writers.items() if writer == rank])


def load_rank(engine: Any, folder: str) -> None:
    """Loads this rank's part of model, optimiser, scheduler and random state into veRL's FSDP engine.

    Raises:
        DataError: the checkpoint is incomplete, or holds what must not be unpickled.
    """
    manager = engine.checkpoint_manager
    _check_content(Path(folder), manager.rank)
    if saved_world_sizes(Path(folder)) != [manager.world_size]:
        engine.checkpoint_manager = _Resharding(manager)
    try:
        engine.load_checkpoint(folder, None, False)
    finally:
        engine.checkpoint_manager = manager


class _Resharding:
    """Stands in for veRL's checkpoint manager where another number of ranks wrote the checkpoint.

    Args:
        manager: veRL's, of the model and optimiser to load into.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    def load_checkpoint(self, local_path: str, **_: Any) -> None:
        manager, folder = self.manager, Path(local_path)
        models = load_shards(shard_paths(folder, "model"))
        manager.model.load_state_dict(
            {name: _rank_part(models, name, like=value) for name, value in manager.model.state_dict().items()}
        )
        if manager.optimizer is not None:
            self._load_optimizer(folder)
        self._load_extra(folder)

    def _load_optimizer(self, folder: Path) -> None:
        optimizer = self.manager.optimizer
        saved = load_shards(shard_paths(folder, "optim"))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {
                name: _rank_part([rank["state"][index] for rank in saved], name, like=parameters[index])
                for name in entries
            }
            for index, entries in saved[0]["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": saved[0]["param_groups"]})

    def _load_extra(self, folder: Path) -> None:
        paths = shard_paths(folder, "extra_state")
        # Random state beyond the ranks that there were is no one's; nothing of an update is drawn from it.
        (extra,) = load_shards([paths[min(self.manager.rank, len(paths) - 1)]])
        self.manager.load_rng_state(extra["rng"])
        if extra["lr_scheduler"] is not None and self.manager.lr_scheduler is not None:
            self.manager.lr_scheduler.load_state_dict(extra["lr_scheduler"])


def _rank_part(ranks: list[dict[str, Any]], name: str, *, like: torch.Tensor) -> Any:
    """This rank's part of a saved tensor, sharded as `like`; plain values and unsharded tensors as they are."""
    if name not in ranks[0]:
        raise DataError(f"the checkpoint has no {name}: it is of another model")
    parts = [rank[name] for rank in ranks]
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    whole = whole_tensor(parts)
    if not isinstance(like, DTensor) or not isinstance(parts[0], DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
