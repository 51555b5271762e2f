"""What a run of RL leaves for others: which checkpoint is which model, and where its loggers write."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgpo.config.load import load_config
from dgpo.files import append_jsonl
from dgpo.rl.exports import export_models
from dgpo.rl.train import own_folders
from tests.unit.stubs import make_model


@pytest.fixture
def stage(tmp_path):
    """`train/` of a run of 6 steps, a checkpoint each second, validated at 2 and 4."""
    folder = tmp_path / "run" / "train"
    for step in (2, 4, 6):
        checkpoint = folder / "checkpoints" / f"global_step_{step}"
        model = make_model(checkpoint / "actor" / "huggingface")
        save_file({"weight": torch.full((1,), float(step))}, f"{model}/model.safetensors")
        (checkpoint / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("6")
    append_jsonl(folder / "metrics.jsonl", [{"step": 2, "validation/em": 0.5}, {"step": 4, "validation/em": 0.4}])
    return folder


def exported(stage, **alarm):
    if alarm:
        append_jsonl(stage / "alarms.jsonl", [alarm])
    config = load_config(["world=tiny", "hardware=cpu", f"run_dir={stage.parent}", "train.keep_steps=[4,5]"])
    export_models(config, stage, {})
    return json.loads((stage / "models" / "steps.json").read_text())


def test_each_model_is_a_checkpoint_and_says_which(stage):
    assert exported(stage) == {"model": 6, "best": 2, "before_collapse": 6, "step_4": 4}
    assert load_file(stage / "models" / "best" / "model.safetensors")["weight"].item() == 2


def test_what_was_kept_before_the_alarm_is_before_the_collapse(stage):
    (stage / "last_good").mkdir()
    (stage / "checkpoints" / "global_step_4").rename(stage / "last_good" / "global_step_4")
    assert exported(stage, step=6)["before_collapse"] == 4


def test_without_a_checkpoint_from_before_the_alarm_the_first_stands_there_with_a_word(stage, capsys):
    assert exported(stage, step=3)["before_collapse"] == 2
    assert "of step 2: none is from before the alarm of step 3" in capsys.readouterr().out


def test_loggers_write_into_the_runs_folder_unless_the_shell_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("TENSORBOARD_DIR", "/elsewhere")
    folders = own_folders(tmp_path)
    assert (folders["WANDB_DIR"], folders["TENSORBOARD_DIR"]) == (str(tmp_path), "/elsewhere")
    assert folders["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
