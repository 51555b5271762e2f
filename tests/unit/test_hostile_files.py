"""Files of others: nothing in them is run, believed about sizes, followed out of its folder, or shown as markup."""

import json
import os

import pytest
import torch

from dgpo.config.model_files import check_model_folder, safetensors_header, tokenizer_difference
from dgpo.data.contamination import markdown
from dgpo.errors import ConfigError, DataError
from dgpo.evaluation.compare import Table, to_markdown
from dgpo.models.model_folders import weights_dtype
from dgpo.models.shards import load_shards
from dgpo.rl.rank_checkpoints import load_rank
from dgpo.runs.run_state import rewind_to
from tests.unit.stubs import make_model


class Plant:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Engine:
    """veRL's, which would unpickle anything."""

    class checkpoint_manager:
        world_size, rank = 1, 0

    def load_checkpoint(self, folder, *_):
        for path in sorted(os.listdir(folder)):
            torch.load(os.path.join(folder, path), weights_only=False)


@pytest.mark.parametrize("kind", ["model", "optim", "extra_state"])
def test_a_pickle_planted_in_a_runs_own_checkpoint_is_not_run_on_resume(tmp_path, kind):
    (tmp_path / "actor").mkdir()
    for each in ("model", "optim", "extra_state"):
        content = {"w": torch.zeros(2), **({"x": Plant(tmp_path / "stolen")} if each == kind else {})}
        torch.save(content, tmp_path / "actor" / f"{each}_world_size_1_rank_0.pt")
    with pytest.raises(DataError, match="holds more than tensors and plain values"):
        load_rank(Engine(), str(tmp_path / "actor"))
    assert not (tmp_path / "stolen").exists()


def test_a_pickle_planted_in_the_trainers_own_state_is_not_run_on_resume(tmp_path):
    checkpoint = tmp_path / "global_step_2"
    checkpoint.mkdir()
    torch.save({"rng": Plant(tmp_path / "stolen"), "kl_coef": None, "record": None}, checkpoint / "driver.pt")
    with pytest.raises(DataError, match="holds more than tensors and plain values"):
        rewind_to(tmp_path / "metrics.jsonl", checkpoint)
    assert not (tmp_path / "stolen").exists()


def test_random_states_are_plain_values(tmp_path):
    """veRL saves them beside the weights: torch's, Python's, and numpy's, which is an array."""
    import random

    import numpy as np

    state = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    torch.save({"rng": state, "lr_scheduler": {"last_epoch": 3}}, tmp_path / "extra_state_world_size_1_rank_0.pt")
    (extra,) = load_shards([tmp_path / "extra_state_world_size_1_rank_0.pt"])
    assert (extra["rng"]["numpy"][1] == state["numpy"][1]).all()
    assert extra["rng"]["random"] == state["random"]


ABSURD = {
    "a header of 8 exabytes": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a header as long as the file claims to be": (10**12).to_bytes(8, "little") + b"{}",
    "no header": b"",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "tensors without a place": (9).to_bytes(8, "little") + b'{"w": {}}',
    "three numbers in eight bytes": (56).to_bytes(8, "little")
    + b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'.ljust(56)
    + bytes(8),
    "a tensor of a petabyte": (62).to_bytes(8, "little")
    + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,1000000000000000]}}'[:62],
}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": 3}}),
        ("tokenizer.json", {"model": {"vocab": {}, "merges": [3]}}),
        ("tokenizer.json", {"added_tokens": [3]}),
        ("tokenizer.json", {"added_tokens": [{}]}),
        ("tokenizer_config.json", {"chat_template": [3]}),
        ("tokenizer_config.json", {"chat_template": 3}),
    ],
)
def test_a_tokenizer_of_strange_values_is_refused_by_its_file(tmp_path, file, content):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(content if name == file else {}))
    with pytest.raises(ConfigError, match=rf"{file}.*copy or save the model again"):
        tokenizer_difference(str(folder), str(folder), keys=("student.path", "teacher.path"))


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_header_is_refused_and_not_allocated(tmp_path, name):
    folder = make_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(ABSURD[name])
    with pytest.raises(ConfigError, match="is no whole file of weights"):
        check_model_folder(folder, key="student.path")
    if safetensors_header(tmp_path / "model" / "model.safetensors") is None:
        with pytest.raises(ConfigError, match="has no weights of"):
            weights_dtype(tmp_path / "model")


def test_a_sparse_file_does_not_make_room_for_its_header(tmp_path):
    """Its size is as claimed, and costs its maker nothing."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)
    assert safetensors_header(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "", "a/b.safetensors"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, index, name):
    folder = make_model(tmp_path / "model")
    (tmp_path / "model" / index).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ConfigError, match="names other things than weight files in this folder"):
        check_model_folder(folder, key="student.path")


def test_questions_and_settings_are_no_markup_in_markdown():
    script = "<script>alert(1)</script>"
    page = to_markdown([Table("Tests", "note", ("slice", "a"), [(script, "1 | 2")])], title="a and b")
    pair = {"test_question": script, "test_id": "1", "train_question": script, "train_id": "2", "exact": True}
    counts = dict.fromkeys(("questions", "duplicates", "conflicting_duplicates", "answers_in_question"), 0)
    report = {"min_share": 0.5, "ngram": 8, "train": None, "tests": {"nq": {**counts, "overlaps": [pair]}}}
    for text in (page, markdown(report)):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
