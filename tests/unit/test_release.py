"""The authors' release's commands: arguments without `=`, its variables, its seven-set test file."""

import pytest

from dgpo.config.load import load_config
from dgpo.config.release import with_positions
from dgpo.data.rows import write_rows
from dgpo.errors import ConfigError, DataError
from dgpo.evaluation.paper import SETS
from dgpo.evaluation.stage import read_test_sets
from tests.unit.fake_model import make_question


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a checkout may have a data/ of its own
    for name in ("DATA_ROOT", "EXP_ROOT"):
        monkeypatch.delenv(name, raising=False)


def test_train_takes_data_student_teacher_and_experiment_and_then_overrides(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    monkeypatch.setenv("EXP_ROOT", "/exp")
    config = load_config(with_positions("train", ["mine", "me/student", "me/teacher", "first", "train.num_steps=3"]))
    assert config.data.train_file == "/data/mine/train.parquet"
    assert (config.train.init, config.teacher.path) == ("me/student", "me/teacher")
    assert (config.run_dir, config.train.num_steps, config.stages) == ("/exp/first", 3, ["train"])


def test_what_is_left_out_has_the_releases_default():
    config = load_config(with_positions("train", ["nq_hotpotqa_train"]))
    assert config.train.init == "omron-sinicx/Qwen2.5-0.5B-Instruct-kd"
    assert config.teacher.path == "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"
    assert config.run_dir == "runs/dgpo-qwen2.5-0.5b"
    config = load_config(with_positions("test", ["nq_hotpotqa_train", "me/model", "exp", "test.compat=upstream"]))
    assert config.test.models == {"model": "me/model"}
    assert config.data.test_files == {"all": "data/nq_hotpotqa_train/test.parquet"}
    assert config.test.compat == "upstream"


def test_a_folder_of_prepare_is_one_file_for_each_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    folder = tmp_path / "prepared"
    folder.mkdir()
    write_rows(folder / "nq_test.parquet", [make_question(0, "x")])
    config = load_config(with_positions("test", ["prepared", "me/model"]))
    assert config.data.test_files == {name: f"{folder}/{name}_test.parquet" for name in SETS}
    write_rows(folder / "test.parquet", [make_question(0, "x")])
    assert load_config(with_positions("test", ["prepared"])).data.test_files == {"all": f"{folder}/test.parquet"}


def test_the_default_data_is_what_download_and_prepare_wrote_where_the_releases_folder_is_not_there(tmp_path):
    for name in ("train", "prepared"):
        (tmp_path / "data" / name).mkdir(parents=True)
    write_rows(tmp_path / "data" / "prepared" / "nq_test.parquet", [make_question(0, "x")])
    data = "nq_hotpotqa_train"
    assert load_config(with_positions("train", [data])).data.train_file == "data/train/train.parquet"
    assert load_config(with_positions("test", [data])).data.test_files["nq"] == "data/prepared/nq_test.parquet"
    (tmp_path / "data" / data).mkdir()
    assert load_config(with_positions("train", [data])).data.train_file == f"data/{data}/train.parquet"
    assert load_config(with_positions("train", ["mine"])).data.train_file == "data/mine/train.parquet"


def test_a_bare_command_is_the_releases_where_its_variable_is_set(monkeypatch):
    assert with_positions("test", []) == []
    assert with_positions("train", ["world=tiny"]) == ["world=tiny"]
    monkeypatch.setenv("DATA_ROOT", "/data")
    assert load_config(with_positions("test", [])).test.models == {
        "DGPO_qwen2_5_0_5b": "omron-sinicx/DGPO-qwen2.5-0.5b"
    }
    assert with_positions("train", ["world=tiny"]) == ["world=tiny"]


@pytest.mark.parametrize("arguments", [["a", "b", "c", "d", "e"], ["a", "seed=1", "b"]])
def test_arguments_out_of_place_are_refused(arguments):
    with pytest.raises(ConfigError, match=r"expected \{data\} \{student\} \{teacher\} \{exp\}"):
        with_positions("train", arguments)


def test_the_data_folder_is_the_variables(monkeypatch):
    assert load_config([]).prepare.out == "data/prepared"
    monkeypatch.setenv("DATA_ROOT", "/data")
    config = load_config(["data=prepared"])
    assert (config.download.folder, config.prepare.benchmarks) == ("/data", "/data/benchmarks")
    assert config.data.test_files["musique"] == "/data/prepared/musique_test.parquet"


def test_a_file_of_several_sets_is_each_of_them(tmp_path):
    rows = [make_question(i, "a", source=source, id=f"{source}-{i}") for source in ("nq", "musique") for i in range(3)]
    write_rows(tmp_path / "test.parquet", rows)
    config = load_config([f"data.test_files.all={tmp_path}/test.parquet", "test.max_questions=2"])
    assert {name: len(group) for name, group in read_test_sets(config).items()} == {"nq": 2, "musique": 2}
    write_rows(tmp_path / "nq.parquet", rows[:3])
    config.data.test_files["nq"] = str(tmp_path / "nq.parquet")
    with pytest.raises(DataError, match="the set nq is in another file too"):
        read_test_sets(config)
