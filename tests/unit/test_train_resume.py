"""`train` up to where Ray would start: what a run may go on with, and that two never work in one folder."""

import json
import os
from pathlib import Path

import pytest

from dgpo.config.load import load_config
from dgpo.data.rows import write_rows
from dgpo.errors import ConfigError
from dgpo.rl import train as module
from dgpo.rl.train import train
from dgpo.runs.artifacts import write_manifest
from tests.unit.stubs import make_model, make_row


@pytest.fixture
def started(monkeypatch):
    """The configurations with which veRL was to be started; it makes nothing."""
    runs = []
    monkeypatch.setattr(module, "_run_with_restarts", lambda config, folder: runs.append(config))
    monkeypatch.setattr(module, "export_models", lambda config, folder, settings: folder / "model")
    monkeypatch.setattr(module, "export_environment", lambda hardware: None)
    monkeypatch.setattr(module, "mark_processes", lambda folder: None)
    monkeypatch.setattr(module, "remove_remains", lambda: None)
    monkeypatch.setattr(module.ray_cluster, "use_token", lambda folder: None)
    return runs


@pytest.fixture
def config(tmp_path, started):
    config = load_config(["world=tiny", "hardware=cpu"])
    config.run_dir = str(tmp_path / "run")
    config.student.path = make_model(tmp_path / "student")
    config.train.init = config.student.path
    config.train.mini_batch_size = config.train.batch_size // 2
    config.teacher.path = make_model(tmp_path / "teacher", weights=b"teacher")
    config.data.train_file, config.data.validation_file = str(tmp_path / "train.parquet"), None
    write_rows(config.data.train_file, [make_row(i, None) for i in range(config.train.batch_size)])
    config.retriever.backend = "tests.unit.fake_model:ShelfSearch"
    config.retriever.backend_options = {"shelf": {"x": ["y"]}}
    return config


@pytest.fixture
def begun(config):
    train(config)
    config.resume = True
    return config


def other_weights(path):
    file = Path(path) / "model.safetensors"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: setattr(c.train, "batch_size", c.train.batch_size // 2), "train.batch_size was"),
        (
            lambda c: vars(c.train).update(algorithm="grpo", samples_per_question=4),
            'train.algorithm was "ppo", now "grpo"',
        ),
        (lambda c: setattr(c.train, "actor_learning_rate", 0.5), "train.actor_learning_rate was"),
        (lambda c: setattr(c.train, "clip_ratio", 0.5), "train.clip_ratio was 0.2, now 0.5"),
        (lambda c: setattr(c.train.teacher_term, "gate", "all"), 'train.teacher_term.gate was "failed", now "all"'),
        (lambda c: setattr(c, "seed", 7), "seed was 1, now 7"),
        (lambda c: setattr(c.episode, "max_turns", 1), "episode.max_turns was"),
        (lambda c: c.hardware.verl.update({"algorithm.gamma": 0.5}), "hardware.verl.algorithm.gamma was"),
        (lambda c: c.retriever.backend_options.update(shelf={}), "retriever.options.shelf.x was"),
        (lambda c: write_rows(c.data.train_file, [make_row(i + 1, None) for i in range(64)]), "data.train_file was"),
        (lambda c: other_weights(c.train.init), "weights at the start was"),
        (lambda c: other_weights(c.teacher.path), "weights of the teacher was"),
    ],
)
def test_a_run_goes_on_with_nothing_else_and_names_what_differs(begun, started, change, named):
    change(begun)
    written = (Path(begun.run_dir) / "train" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"run/train was made with other settings \(.*{named}") as error:
        train(begun)
    assert "\n" not in str(error.value)
    assert len(started) == 1
    assert (Path(begun.run_dir) / "train" / "config.yaml").read_text() == written


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.train, "num_steps", 99),
        lambda c: setattr(c.train, "save_every", 1),
        lambda c: setattr(c.train, "validate_every", 1),
        lambda c: setattr(c.train, "loggers", ["tensorboard"]),
        lambda c: setattr(c.train.limits, "rollout_s", 9.0),
        lambda c: setattr(c.train.stability, "action", "stop"),
        lambda c: setattr(c.train, "max_restarts", 0),
        lambda c: setattr(c.retriever, "max_retries", 9),
        lambda c: setattr(c.hardware.engine, "max_num_seqs", 3),
        lambda c: (
            Path(c.teacher.path).rename(Path(c.teacher.path).with_name("moved"))
            and setattr(c.teacher, "path", str(Path(c.teacher.path).with_name("moved")))
        ),
    ],
)
def test_length_cadence_limits_machine_and_places_may_change(begun, started, change):
    change(begun)
    train(begun)
    assert len(started) == 2


def test_a_run_that_recorded_nothing_goes_on_with_a_note(begun, started, capsys):
    (Path(begun.run_dir) / "train" / "settings.json").unlink()
    train(begun)
    assert "was not recorded, and is not compared" in capsys.readouterr().err
    assert len(started) == 2


def test_a_finished_run_of_something_else_is_not_passed_off_as_this_one(begun, started):
    model = Path(make_model(Path(begun.run_dir) / "train" / "model"))
    counts = {"steps": begun.train.num_steps}
    write_manifest(model, stage="train", inputs={}, config={}, counts=counts, seed=1)
    assert train(begun) == model
    begun.seed = 7
    with pytest.raises(ConfigError, match="seed was 1, now 7"):
        train(begun)
    assert len(started) == 1


def test_resuming_a_run_that_is_alive_is_refused_before_its_processes_are_looked_for(begun, monkeypatch):
    """What is left of a run is killed when another takes its folder: never while its command lives."""
    killed = []
    monkeypatch.setattr(module, "end_processes", lambda folder, grace_s: killed.append(folder))

    def start_another(*_):
        killed.clear()
        with pytest.raises(ConfigError, match="is in use by"):
            train(begun)
        assert killed == []

    monkeypatch.setattr(module, "_run_with_restarts", start_another)
    train(begun)
    assert json.loads((Path(begun.run_dir) / "train" / "settings.json").read_text())["seed"] == 1
