"""FSDP shards as veRL writes them, `<kind>_world_size_<N>_rank_<K>.pt`, read as the whole tensors they are parts of.

veRL's own merger casts every weight to bfloat16 and unpickles whatever the files hold; a checkpoint of unknown origin
deserves neither. Here tensors keep their dtype, and `torch.load` may only build tensors and plain values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from dgpo.errors import DataError
from dgpo.runs.plain_values import load_plain

_SHARD = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")


def saved_world_sizes(folder: Path, kind: str = "model") -> list[int]:
    """Numbers of ranks by which shards of this kind were written into the folder; empty without any."""
    matches = (_SHARD.fullmatch(path.name) for path in folder.glob(f"{kind}_world_size_*.pt"))
    return sorted({int(match[2]) for match in matches if match and match[1] == kind})


def shard_paths(folder: Path, kind: str = "model") -> list[Path]:
    """Every rank's file, in rank order.

    Raises:
        DataError: there are none, some are missing, or the folder holds those of two runs.
    """
    sizes = saved_world_sizes(folder, kind)
    if len(sizes) != 1:
        found = f"of {' and of '.join(map(str, sizes))} ranks" if sizes else "none"
        raise DataError(f"{folder}: expected {kind} shards of one number of ranks, found {found}")
    paths = [folder / f"{kind}_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(paths)} {kind} shards are missing ({', '.join(missing[:3])}): copy the "
            "checkpoint again, from every node that wrote a part of it"
        )
    return paths


def load_shards(paths: Sequence[Path]) -> list[Any]:
    """The content of the files, tensors mapped from the disk and not read yet.

    Raises:
        DataError: a file is cut off, or holds more than tensors and plain values.
    """
    return [load_plain(path) for path in paths]


def whole_tensors(states: list[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor of every entry, one at a time, in the order of rank 0's file.

    Raises:
        DataError: as `whole_tensor`, with the name.
    """
    for name in states[0]:
        absent = [rank for rank, state in enumerate(states) if name not in state]
        if absent:
            raise DataError(f"{name} is in the shard of rank 0, but not in that of rank {absent[0]}")
        try:
            yield name, whole_tensor([state[name] for state in states])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None


def whole_tensor(parts: Sequence[Any]) -> torch.Tensor:
    """The tensor whose parts the ranks hold.

    FSDP shards along one dimension, in rank order; with replicas (HSDP) the first ranks hold the first replica. What is
    no DTensor is a buffer, the same on every rank.

    Raises:
        DataError: the parts do not make up the whole, or are placed in a way that FSDP does not use.
    """
    first = parts[0]
    if not isinstance(first, DTensor):
        if any(part.shape != first.shape or not torch.equal(part, first) for part in parts[1:]):
            raise DataError("expected equal copies on all ranks, found different ones")
        return first
    placements = first.placements
    sharded = [placement for placement in placements if not isinstance(placement, Replicate)]
    if not sharded:
        return first._local_tensor
    if len(sharded) > 1 or type(sharded[0]) is not Shard or placements[-1] != sharded[0]:
        raise DataError(f"placed as {placements}, expected shards along one dimension, as FSDP makes them")
    dimension, local = sharded[0].dim, []
    for part in parts:
        local.append(part._local_tensor)
        if sum(piece.shape[dimension] for piece in local) >= first.shape[dimension]:
            break
    whole = torch.cat(local, dim=dimension)
    if whole.shape != first.shape:
        raise DataError(f"the shards make up {tuple(whole.shape)}, expected {tuple(first.shape)}")
    return whole
