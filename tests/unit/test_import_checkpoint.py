"""Checkpoints of other trainers as model folders: what is taken, and what is refused with which words."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.__main__ import main
from dgpo.config.model_files import check_model_folder
from dgpo.errors import ConfigError, DataError
from dgpo.models.lora import merge_adapters
from dgpo.models.shards import load_shards, shard_paths
from dgpo.tinyworld.models import ModelSize, make_model, save_model
from tests.distill_stage import tiny_model, tiny_tokenizer


def save_shards(folder, *, tied=True):
    """A step's folder as veRL's one rank writes it. Returns the model."""
    tokenizer = tiny_tokenizer()
    model = make_model(ModelSize(hidden_size=32, num_layers=1, num_heads=1), tokenizer, seed=0)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    save_model(model, tokenizer, folder / "actor" / "huggingface")
    (folder / "actor" / "huggingface" / "model.safetensors").unlink()  # veRL's default keeps shards only
    torch.save(model.state_dict(), folder / "actor" / "model_world_size_1_rank_0.pt")
    shutil.copytree(folder / "actor", folder / "critic")
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def run_import(checkpoint, out, *more):
    return main(["import", f"checkpoint={checkpoint}", f"out={out}", *more])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("named", ["", "actor"])
def test_shards_become_a_model_that_computes_the_same(tmp_path, tied, named):
    """A step's folder or its `actor`; with the output layer tied to the embeddings or its own."""
    model = save_shards(tmp_path / "global_step_5", tied=tied)
    assert run_import(tmp_path / "global_step_5" / named, tmp_path / "out") == 0
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert imported.dtype == torch.float32
    assert imported.config.tie_word_embeddings is tied
    assert torch.equal(logits(imported), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["stop_strings"] == ["</search>", "</answer>"]
    check_model_folder(str(tmp_path / "out"), key="teacher.path")


def test_the_dtype_is_chosen(tmp_path):
    model = save_shards(tmp_path / "global_step_5")
    assert run_import(tmp_path / "global_step_5", tmp_path / "out", "dtype=bfloat16") == 0
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert imported.dtype == torch.bfloat16
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(imported.state_dict()[name], tensor)


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_folder_as_search_r1_saves_it(tmp_path, with_tokenizer, weights):
    """Weights in the checkpoint's own folder; a tokenizer there, or else of the model named as base."""
    tokenizer, source = tiny_tokenizer(), tmp_path / "actor" / "global_step_300"
    model = tiny_model(tokenizer, 3)
    save_model(model, tokenizer, tmp_path / "base")
    save_model(model, tokenizer, source)
    if weights == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / weights)
    if not with_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (source / name).unlink()
    more = [] if with_tokenizer else [f"base={tmp_path / 'base'}"]
    assert run_import(source, tmp_path / "out", *more) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def refused(tmp_path, capsys, checkpoint, *more):
    assert run_import(checkpoint, tmp_path / "out", *more) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_a_critic_is_refused_by_its_folder_and_by_its_weights(tmp_path, capsys):
    save_shards(tmp_path / "global_step_5")
    error = refused(tmp_path, capsys, tmp_path / "global_step_5" / "critic")
    assert "is a critic" in error
    assert "import the actor beside it" in error
    renamed = tmp_path / "value_model"
    shutil.copytree(tmp_path / "global_step_5" / "actor", renamed)
    state = torch.load(renamed / "model_world_size_1_rank_0.pt", weights_only=True)
    del state["lm_head.weight"]
    state["score.weight"] = torch.zeros(1, 32)
    torch.save(state, renamed / "model_world_size_1_rank_0.pt")
    assert "this is a critic: import the actor beside it" in refused(tmp_path, capsys, renamed)


def test_a_missing_shard_is_named(tmp_path, capsys):
    save_shards(tmp_path / "global_step_5")
    actor = tmp_path / "global_step_5" / "actor"
    (actor / "model_world_size_1_rank_0.pt").rename(actor / "model_world_size_2_rank_0.pt")
    error = refused(tmp_path, capsys, actor)
    assert "1 of 2 model shards are missing (model_world_size_2_rank_1.pt)" in error


def test_shards_of_two_runs_are_refused(tmp_path, capsys):
    save_shards(tmp_path / "global_step_5")
    actor = tmp_path / "global_step_5" / "actor"
    shutil.copy(actor / "model_world_size_1_rank_0.pt", actor / "model_world_size_2_rank_0.pt")
    assert "shards of one number of ranks, found of 1 and of 2 ranks" in refused(tmp_path, capsys, actor)


def test_a_shard_that_is_cut_off_is_told(tmp_path, capsys):
    save_shards(tmp_path / "global_step_5")
    shard = tmp_path / "global_step_5" / "actor" / "model_world_size_1_rank_0.pt"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "is no whole file of tensors" in refused(tmp_path, capsys, tmp_path / "global_step_5")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch stolen",)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_shards(tmp_path / "global_step_5")
    torch.save({"w": Malicious()}, tmp_path / "global_step_5" / "actor" / "model_world_size_1_rank_0.pt")
    error = refused(tmp_path, capsys, tmp_path / "global_step_5")
    assert "holds more than tensors and plain values, and is not unpickled" in error
    assert not (tmp_path / "stolen").exists()


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    save_shards(tmp_path / "global_step_5")
    other = make_model(ModelSize(hidden_size=64, num_layers=2, num_heads=1), tiny_tokenizer(), seed=0)
    torch.save(other.state_dict(), tmp_path / "global_step_5" / "actor" / "model_world_size_1_rank_0.pt")
    error = refused(tmp_path, capsys, tmp_path / "global_step_5")
    assert "is of another model than" in error
    assert "model.layers.1." in error or "expected (" in error
    assert "base=PATH" in error


def test_a_folder_of_several_steps_is_not_guessed_from(tmp_path, capsys):
    for step in (5, 10):
        save_shards(tmp_path / "checkpoints" / f"global_step_{step}")
    error = refused(tmp_path, capsys, tmp_path / "checkpoints")
    assert "holds 2 checkpoints: name one of them" in error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "expected FSDP shards (model_world_size_N_rank_K.pt) or a model folder"),
        (lambda path: (path / "dist_ckpt").mkdir(parents=True), "is Megatron's: merge it with"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, capsys, make, message):
    make(tmp_path / "thing")
    assert message in refused(tmp_path, capsys, tmp_path / "thing")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["dtype=int8"], "dtype=int8: expected one of float32, bfloat16, float16"),
        (["device=cpu"], "not device="),
        (["out="], "exists: choose another out"),
    ],
)
def test_options_that_are_not_understood_are_told(tmp_path, capsys, more, message):
    save_shards(tmp_path / "global_step_5")
    assert run_import(tmp_path / "global_step_5", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_shards_as_a_models_path_lead_to_import(tmp_path):
    save_shards(tmp_path / "global_step_5")
    with pytest.raises(ConfigError, match=r"teacher.path=.*python -m dgpo import checkpoint="):
        check_model_folder(str(tmp_path / "global_step_5"), key="teacher.path")


def test_adapters_are_added_to_their_weights(tmp_path):
    """W = 0, B A = [[2], [4]] [[1, 3]], alpha / r = 4 / 2."""
    (tmp_path / "lora_train_meta.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}))
    state = {
        "base_model.model.model.q_proj.base_layer.weight": torch.zeros(2, 2),
        "base_model.model.model.q_proj.base_layer.bias": torch.ones(2),
        "base_model.model.model.q_proj.lora_A.default.weight": torch.tensor([[1.0, 3.0]]),
        "base_model.model.model.q_proj.lora_B.default.weight": torch.tensor([[2.0], [4.0]]),
        "base_model.model.model.norm.weight": torch.ones(2),
    }
    merged = merge_adapters(state, tmp_path)
    assert sorted(merged) == ["model.norm.weight", "model.q_proj.bias", "model.q_proj.weight"]
    assert merged["model.q_proj.weight"].tolist() == [[4.0, 12.0], [8.0, 24.0]]


def test_the_readers_refuse_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="found none"):
        shard_paths(tmp_path)
    with pytest.raises(DataError, match="no whole file"):
        load_shards([tmp_path / "model_world_size_1_rank_0.pt"])
