"""Checkpoints of two real FSDP2 ranks: merged they are the whole model, and other numbers of ranks go on from them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dgpo.__main__ import main
from dgpo.tinyworld.models import ModelSize, make_model, save_model
from tests.conftest import ROOT, run_command
from tests.distill_stage import tiny_tokenizer

pytestmark = pytest.mark.engine


def ranks(command, folder, count):
    result = run_command(str(ROOT / "tests" / "engine" / "fsdp_ranks.py"), command, str(folder), str(count))
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / f"after_{command}_{count}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Three layers of 48 do not divide into shards of equal size for any number of ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    tokenizer = tiny_tokenizer()
    for name, seed in (("start", 0), ("other", 1)):
        model = make_model(ModelSize(hidden_size=48, num_layers=3, num_heads=3), tokenizer, seed=seed)
        save_model(model, tokenizer, folder / name)
    ranks("save", folder, 2)
    return folder


def test_merged_shards_are_the_whole_model(two_ranks, tmp_path):
    assert main(["import", f"checkpoint={two_ranks / 'global_step_2'}", f"out={tmp_path / 'out'}"]) == 0
    saved = torch.load(two_ranks / "saved.pt")
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert imported.dtype == torch.float32
    own = imported.state_dict()
    assert own.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(own[name], saved[name])] == []
    whole = AutoModelForCausalLM.from_pretrained(two_ranks / "start")
    whole.load_state_dict(saved)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(imported(ids).logits, whole(ids).logits)


@pytest.mark.slow
def test_in_bfloat16_they_are_what_verls_merger_makes(two_ranks, tmp_path):
    step = two_ranks / "global_step_2"
    assert main(["import", f"checkpoint={step}", f"out={tmp_path / 'ours'}", "dtype=bfloat16"]) == 0
    merge = ["-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(step / "actor")]
    result = run_command(*merge, "--target_dir", str(tmp_path / "verls"))
    assert result.returncode == 0, result.stderr[-3000:]
    ours, verls = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "verls"))
    assert ours.keys() == verls.keys()
    assert [name for name in verls if not torch.equal(ours[name], verls[name])] == []


def test_a_rank_that_is_missing_is_named(two_ranks, tmp_path, capsys):
    shutil.copytree(two_ranks / "global_step_2" / "actor", tmp_path / "actor")
    (tmp_path / "actor" / "model_world_size_2_rank_1.pt").unlink()
    assert main(["import", f"checkpoint={tmp_path / 'actor'}", f"out={tmp_path / 'out'}"]) == 2
    assert "1 of 2 model shards are missing (model_world_size_2_rank_1.pt)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["critic", "value_model"])
def test_a_real_critic_is_refused(two_ranks, tmp_path, capsys, name):
    """By its folder, or by its weights: its configuration is that of the language model it began as."""
    shutil.copytree(two_ranks / "global_step_2" / "critic", tmp_path / name)
    assert main(["import", f"checkpoint={tmp_path / name}", f"out={tmp_path / 'out'}"]) == 2
    assert "is a critic" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_training_goes_on_with_any_number_of_ranks(two_ranks, count):
    """Model, optimiser and schedule: the step after loading ends where the straight run's does."""
    straight = torch.load(two_ranks / "after_save_2.pt")
    resumed = ranks("load", two_ranks, count)
    saved = torch.load(two_ranks / "saved.pt")
    assert any(not torch.equal(saved[name], straight[name]) for name in straight), "the step moves the weights"
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)
