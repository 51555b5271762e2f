"""Ranks of a real FSDP2 training over gloo, with veRL's own checkpoint manager. Run by test_fsdp_checkpoints.py.

python tests/engine/fsdp_ranks.py save|load FOLDER NUM_RANKS

`save` trains two steps, saves, and trains one more; `load` starts from another model, loads, and trains that one step.
Both leave the whole weights after it in `FOLDER/after_<command>_<ranks>.pt`.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="dgpo.platforms.cpu", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[2]))

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


class Engine:
    """What `load_rank` uses of veRL's engine."""

    def __init__(self, manager):
        self.checkpoint_manager = manager

    def load_checkpoint(self, local_path, hdfs_path, del_local_after_load):
        self.checkpoint_manager.load_checkpoint(
            local_path=local_path, hdfs_path=hdfs_path, del_local_after_load=del_local_after_load
        )


def build(model, num_ranks):
    """The sharded model, its manager, and a function that makes a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    contents = ["model", "optimizer", "extra"]
    manager = FSDPCheckpointManager(
        model,
        optimizer,
        scheduler,
        AutoTokenizer.from_pretrained(model.config.name_or_path),
        {"save_contents": contents, "load_contents": contents},
    )

    def step():
        logits = model(input_ids=IDS).logits
        (logits[..., 0].square().mean() + logits.logsumexp(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return manager, step


def work(rank, command, folder, num_ranks):
    meeting = f"file://{folder}/meet_{command}_{num_ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    from dgpo.rl.rank_checkpoints import load_rank

    start = folder / ("start" if command == "save" else "other")
    actor = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    manager, step = build(actor, num_ranks)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if command == "save":
        step()
        step()
        manager.save_checkpoint(str(folder / "global_step_2" / "actor"))
        saved = get_model_state_dict(actor, options=whole)
        if rank == 0:
            torch.save(saved, folder / "saved.pt")
        critic = AutoModelForTokenClassification.from_pretrained(start, dtype=torch.float32, num_labels=1)
        build(critic, num_ranks)[0].save_checkpoint(str(folder / "global_step_2" / "critic"))
    else:
        load_rank(Engine(manager), str(folder / "global_step_2" / "actor"))
    step()
    after = get_model_state_dict(actor, options=whole)
    if rank == 0:
        torch.save(after, folder / f"after_{command}_{num_ranks}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _, name, path, count = sys.argv
    mp.spawn(work, (name, Path(path), int(count)), nprocs=int(count))
