"""What a run may be continued under: one comparison, one list, one line that names what differs."""

import json
from dataclasses import asdict

import pytest

from dgpo.config.load import load_config
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.settings import MAY_CHANGE, differences, fixed_settings, flat, is_finished, record_or_check


def test_what_differs_is_one_line_with_both_values():
    before = {"seed": 1, "weights": "a" * 64, "data.test_files": {"nq": "b" * 64}}
    now = {"seed": 2, "weights": "c" * 64, "data.test_files": {"nq": "b" * 64, "hop": "d" * 64}}
    assert differences(before, now) == (
        f"data.test_files.hop was not recorded, now {'d' * 12}..; seed was 1, now 2; "
        f"weights was {'a' * 12}.., now {'c' * 12}.."
    )
    assert differences(before, before) == ""


def test_a_long_list_of_differences_is_cut_and_counted():
    line = differences({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert line.count(" was ") == 6
    assert line.endswith("; and 3 more")


def test_a_setting_that_an_older_version_did_not_know_had_its_default():
    now = {"train.gamma": Config().train.gamma, "train.clip_ratio": 0.9}
    assert differences({}, now) == "train.clip_ratio was 0.2, now 0.9"


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_may_change_is_a_setting_that_exists(key):
    keys = flat(asdict(Config()))
    assert any(each == key or each.startswith(f"{key}.") for each in keys), key


@pytest.mark.parametrize(
    "override",
    ["train.num_steps=9", "train.save_every=7", "train.loggers=[wandb]", "train.limits.save_s=5", "retriever.url=http://x",
     "train.stability.action=stop", "hardware.gpus_per_node=2", "student.path=elsewhere", "test.samples=3"],
)  # fmt: skip
def test_cadence_limits_machine_and_places_may_change(override):
    assert of_training(override) == of_training()


@pytest.mark.parametrize(
    "override",
    ["seed=2", "train.batch_size=16", "train.algorithm=grpo", "train.reward=a:b", "train.actor_learning_rate=1",
     "train.teacher_term.form=exact", "episode.topk=1", "hardware.engine.dtype=float32",
     "hardware.verl.trainer.critic_warmup=5", "train.temperature=0.5"],
)  # fmt: skip
def test_what_decides_the_training_may_not_change(override):
    assert override.partition("=")[0] in differences(of_training(), of_training(override))


def of_training(*overrides):
    return fixed_settings(load_config(overrides), "episode", "train", "hardware.engine.dtype", "hardware.verl")


def test_a_folder_is_continued_under_the_settings_that_it_was_begun_with(tmp_path, capsys):
    record_or_check(tmp_path, {"seed": 1})
    record_or_check(tmp_path, {"seed": 1})
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ConfigError, match=r"was made with other settings \(seed was 1, now 2\): go back to them"
    ) as error:
        record_or_check(tmp_path, {"seed": 2})
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}


def test_a_folder_of_a_version_that_recorded_nothing_goes_on_with_a_note(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    record_or_check(tmp_path, {"seed": 1})
    assert "was not recorded, and is not compared" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="seed was 1, now 2"):
        record_or_check(tmp_path, {"seed": 2})


def test_a_finished_stage_stands_for_its_own_settings_only(tmp_path, capsys):
    assert not is_finished(tmp_path, stage="collect", settings={"seed": 1})
    made = {"stage": "collect", "inputs": {}, "config": {}, "counts": {}, "seed": 1}
    write_manifest(tmp_path, **made, settings={"seed": 1})
    assert is_finished(tmp_path, stage="collect", settings={"seed": 1})
    with pytest.raises(ConfigError, match="seed was 1, now 2"):
        is_finished(tmp_path, stage="collect", settings={"seed": 2})
    write_manifest(tmp_path, **made)
    capsys.readouterr()
    assert is_finished(tmp_path, stage="collect", settings={"seed": 2}), "of a version that recorded nothing"
    assert "what it was made from was not recorded" in capsys.readouterr().err
