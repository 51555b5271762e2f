"""Collection with a teacher whose every turn is known: what is kept, continued, refused."""

import json
import os
from pathlib import Path

import pytest

from dgpo.coldstart.collect import collect
from dgpo.data.rows import write_rows
from dgpo.errors import ConfigError
from tests.unit.fake_model import ChatTokenizer, FakeModel, fake_config, make_question, use_model

SHELF = {"x": ['"X"\nx']}
QUESTIONS = [make_question(index, "right") for index in range(4)]


@pytest.fixture
def teacher(monkeypatch):
    model = FakeModel(lambda text, seed: "<answer>right</answer>")
    use_model(monkeypatch, model)
    monkeypatch.setattr("dgpo.coldstart.collect.load_tokenizer", lambda *_, **__: ChatTokenizer())
    return model


@pytest.fixture
def config(teacher, tmp_path):
    config = fake_config(tmp_path, {"own": QUESTIONS}, SHELF)
    config.teacher.path, config.data.collect_file = config.test.models["mine"], config.data.test_files["own"]
    return config


@pytest.fixture
def interrupted(config, teacher):
    """One that ended after two episodes, to be resumed."""
    config.hardware.engine.concurrency = 1
    right = teacher.reply

    def dying(text, seed):
        if "Q2" in text:
            raise OSError("gone")
        return right(text, seed)

    teacher.reply = dying
    with pytest.raises(OSError, match="gone"):
        collect(config)
    teacher.reply, teacher.num_turns, config.resume = right, 0, True
    return config


def other_weights(config):
    path = Path(config.teacher.path) / "model.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [
    (other_weights, "weights was"),
    (lambda c: write_rows(c.data.collect_file, QUESTIONS[::-1]), "data.collect_file was"),
    (lambda c: setattr(c.episode, "topk", 1), "episode.topk was 3, now 1"),
    (lambda c: setattr(c.collect, "temperature", 0.5), "temperature was 1.0, now 0.5"),
    (lambda c: c.retriever.backend_options.update(shelf={}), "retriever.options.shelf.x was"),
]


def test_a_finished_collection_is_not_played_again(config, teacher, capsys):
    folder = collect(config)
    turns, config.resume = teacher.num_turns, True
    assert collect(config) == folder
    assert teacher.num_turns == turns
    assert "is finished already" in capsys.readouterr().err
    assert len((folder / "episodes.jsonl").read_text().splitlines()) == 4
    assert json.loads((folder / "manifest.json").read_text())["counts"]["episodes"] == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [*CHANGES, (lambda c: setattr(c.collect, "max_questions", 3), "collect.max_questions was null, now 3")],
)
def test_a_finished_collection_of_something_else_is_refused_with_what_differs(config, teacher, change, named):
    folder = collect(config)
    turns, config.resume = teacher.num_turns, True
    change(config)
    with pytest.raises(ConfigError, match=rf"{folder} was made with other settings \(.*{named}"):
        collect(config)
    assert teacher.num_turns == turns
    assert (folder / "episodes.jsonl").exists()


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_an_unfinished_collection_of_something_else_is_refused_and_kept(interrupted, teacher, change, named):
    change(interrupted)
    partial = Path(interrupted.run_dir) / "collect" / "trajectories.jsonl.partial"
    kept = partial.read_bytes()
    with pytest.raises(ConfigError, match=rf"partial was made with other settings \(.*{named}"):
        collect(interrupted)
    assert (teacher.num_turns, partial.read_bytes()) == (0, kept)


def test_an_unfinished_collection_goes_on_with_more_or_fewer_questions(interrupted, teacher):
    interrupted.collect.max_questions = 3
    collect(interrupted)
    assert teacher.num_turns == 1
