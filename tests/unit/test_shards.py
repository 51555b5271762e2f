"""Whole tensors from the parts that FSDP's ranks hold."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dgpo.errors import DataError
from dgpo.models.shards import whole_tensor, whole_tensors

WHOLE = torch.arange(10.0).reshape(5, 2)


@pytest.fixture
def meshes():
    """Meshes of four ranks, in one dimension and as two replicas of two; no process but this one takes part."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


def parts(locals_, mesh, placements, shape=WHOLE.shape):
    stride = torch.empty(shape).stride()
    return [DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=stride) for t in locals_]


def test_uneven_shards_and_an_empty_one_make_up_the_whole(meshes):
    locals_ = [WHOLE[:2], WHOLE[2:4], WHOLE[4:], WHOLE[5:]]
    assert torch.equal(whole_tensor(parts(locals_, meshes[0], [Shard(0)])), WHOLE)


def test_the_second_dimension_can_be_the_sharded_one(meshes):
    locals_ = [WHOLE[:, :1], WHOLE[:, 1:], WHOLE[:, 2:], WHOLE[:, 2:]]
    assert torch.equal(whole_tensor(parts(locals_, meshes[0], [Shard(1)])), WHOLE)


def test_of_replicas_one_is_read(meshes):
    locals_ = [WHOLE[:3], WHOLE[3:], WHOLE[:3] + 99, WHOLE[3:] + 99]
    assert torch.equal(whole_tensor(parts(locals_, meshes[1], [Replicate(), Shard(0)])), WHOLE)
    everywhere = parts([WHOLE, WHOLE + 99, WHOLE, WHOLE], meshes[0], [Replicate()])
    assert torch.equal(whole_tensor(everywhere), WHOLE)


def test_the_dtype_stays(meshes):
    locals_ = [WHOLE[:2].bfloat16(), WHOLE[2:4].bfloat16(), WHOLE[4:].bfloat16(), WHOLE[5:].bfloat16()]
    assert whole_tensor(parts(locals_, meshes[0], [Shard(0)])).dtype == torch.bfloat16


def test_shards_that_do_not_make_up_the_whole_are_refused(meshes):
    locals_ = [WHOLE[:2], WHOLE[2:4], WHOLE[5:], WHOLE[5:]]
    with pytest.raises(DataError, match=r"layers.0.weight: the shards make up \(4, 2\), expected \(5, 2\)"):
        list(whole_tensors([{"layers.0.weight": part} for part in parts(locals_, meshes[0], [Shard(0)])]))


def test_placements_that_fsdp_does_not_use_are_refused(meshes):
    locals_ = [WHOLE[:3, :1], WHOLE[:3, 1:], WHOLE[3:, :1], WHOLE[3:, 1:]]
    with pytest.raises(DataError, match="expected shards along one dimension"):
        whole_tensor(parts(locals_, meshes[1], [Shard(0), Shard(1)]))


def test_what_is_not_sharded_is_the_same_on_every_rank():
    assert torch.equal(whole_tensor([WHOLE, WHOLE.clone()]), WHOLE)
    with pytest.raises(DataError, match="found different ones"):
        whole_tensor([WHOLE, WHOLE + 1])


def test_ranks_hold_parts_of_the_same_tensors():
    with pytest.raises(DataError, match="bias is in the shard of rank 0, but not in that of rank 1"):
        list(whole_tensors([{"weight": WHOLE, "bias": WHOLE}, {"weight": WHOLE}]))
