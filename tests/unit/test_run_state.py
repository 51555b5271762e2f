"""What a resumed RL run begins with, and what a checkpoint that cannot be written leaves behind."""

import json
import random

import numpy as np
import pytest
import torch

from dgpo.errors import DataError, RunStoppedError
from dgpo.files import append_jsonl
from dgpo.runs.checkpoints import checkpoint_steps, damage, file_entries
from dgpo.runs.run_state import prune, rewind_to, save_checkpoint


def write_ranks(target):
    """Two ranks, each with the entries of its own file."""
    entries = []
    for rank in range(2):
        (target / "actor").mkdir(exist_ok=True)
        (target / "actor" / f"model_rank_{rank}.pt").write_text(f"part {rank}")
        entries.append(file_entries(target, [f"actor/model_rank_{rank}.pt"]))
    return entries


def save(folder, step, *, record=None, write=write_ranks, kl_coef=None):
    save_checkpoint(
        folder / "checkpoints" / f"global_step_{step}",
        write,
        step=step,
        world_size=2,
        dataloader={"position": step},
        kl_coef=kl_coef,
        record=record,
    )
    return folder / "checkpoints" / f"global_step_{step}"


def log(folder, *steps):
    for step in steps:
        append_jsonl(folder / "metrics.jsonl", [{"step": step, "episode/em": 0.5}])


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_saved_checkpoint_is_whole_and_the_newest(tmp_path):
    checkpoint = save(tmp_path, 4)
    assert damage(checkpoint) is None
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert sorted(files) == ["actor/model_rank_0.pt", "actor/model_rank_1.pt", "data.pt", "driver.pt"]


def test_later_records_go_and_so_does_an_unfinished_line(tmp_path):
    checkpoint = save(tmp_path, 2)
    log(tmp_path, 1, 2, 3)
    (tmp_path / "alarms.jsonl").write_text('{"step": 2, "rule": "kl"}\n{"step": 3, "rule": "kl"}\n')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "episode/e')
    start = rewind_to(tmp_path / "metrics.jsonl", checkpoint)
    assert [record["step"] for record in start.records] == steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    assert steps_in(tmp_path / "alarms.jsonl") == [2]
    assert start.unrecorded is None


def test_the_record_that_its_process_did_not_write_is_in_the_checkpoint(tmp_path):
    """Killed after saving step 2, in the middle of writing the step's record."""
    checkpoint = save(tmp_path, 2, record={"step": 2, "episode/em": 0.75}, kl_coef=0.01)
    log(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "episode/em": 0.')
    start = rewind_to(tmp_path / "metrics.jsonl", checkpoint)
    assert start.unrecorded == {"step": 2, "episode/em": 0.75}
    assert start.kl_coef == 0.01
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_what_an_adaptive_controller_makes_of_the_coefficient_is_read_again(tmp_path):
    """veRL's computes it with numpy."""
    checkpoint = save(tmp_path, 2, kl_coef=np.float64(0.25))
    assert rewind_to(tmp_path / "metrics.jsonl", checkpoint).kl_coef == 0.25


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    with pytest.raises(DataError, match=r"driver\.pt holds more than tensors and plain values"):
        save(tmp_path, 2, kl_coef=tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints", "global_step_") == []


def test_a_run_that_begins_again_has_no_records(tmp_path):
    log(tmp_path, 1, 2)
    (tmp_path / "alarms.jsonl").write_text('{"step": 2}\n')
    start = rewind_to(tmp_path / "metrics.jsonl", None)
    assert (start.records, start.unrecorded) == ([], None)
    assert not (tmp_path / "alarms.jsonl").exists(), "the first alarm of a run is known by its absence"


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_random_numbers_go_on(tmp_path):
    checkpoint = save(tmp_path, 1)
    expected = draws()
    draws()
    rewind_to(tmp_path / "metrics.jsonl", checkpoint)
    assert draws() == expected


def test_what_cannot_be_written_leaves_the_checkpoint_before_it(tmp_path):
    save(tmp_path, 2)

    def full_disk(target):
        write_ranks(target)
        raise OSError(28, "No space left on device", "model.pt")

    with pytest.raises(RunStoppedError) as error:
        save(tmp_path, 4, write=full_disk)
    assert "after step 4 could not be written ([Errno 28] No space left on device: 'model.pt')" in str(error.value)
    assert "the one after step 2 is whole" in str(error.value)
    assert checkpoint_steps(tmp_path / "checkpoints", "global_step_") == [2]
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["global_step_2", "latest_checkpointed_iteration.txt"], "the space is given back"


def test_parts_that_only_another_node_sees_are_told(tmp_path):
    def elsewhere(target):
        return [*write_ranks(target), {"actor/model_rank_2.pt": {"size": 1, "sha256": ""}}]

    with pytest.raises(RunStoppedError, match=r"model_rank_2.pt.*a file system that all nodes share"):
        save(tmp_path, 4, write=elsewhere)


def test_rotation_keeps_the_last_and_the_best(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    prune(tmp_path / "checkpoints", {4: 0.5, 8: 0.4}, keep_last=1, keep_best=1)
    assert checkpoint_steps(tmp_path / "checkpoints", "global_step_") == [4, 8]
    assert not list((tmp_path / "checkpoints").glob(".*"))
