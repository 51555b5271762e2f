"""Which Ray a run starts or joins, and what its workers are told, with a stand-in for Ray."""

import os
import stat
import sys
import types

import pytest

from dgpo.config.load import load_config
from dgpo.config.stages import with_absolute_paths
from dgpo.engines.ray_cluster import connect, forget_token
from dgpo.errors import ConfigError


@pytest.fixture
def started(monkeypatch):
    """The arguments of the one call of ray.init."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    arguments = {}

    def init(address, **settings):
        arguments.update(address=address, **settings)

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    yield arguments
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):  # set by the code under test
        os.environ.pop(name, None)


def hardware(*overrides):
    return load_config(["hardware=cpu", *overrides]).hardware


def test_without_an_address_ray_is_private_to_the_run(started, tmp_path):
    connect(hardware(), token_folder=tmp_path)
    assert (started["address"], started["num_cpus"], started["num_gpus"]) == ("local", 32, 1)
    token = tmp_path / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
    forget_token(tmp_path)
    assert not token.exists()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_private_rays_of_one_process_share_a_secret(started, tmp_path):
    """Ray reads its token once: a second one, after the first, would be refused by its own cluster."""
    secrets = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        connect(hardware(), token_folder=folder)
        secrets.append((folder / "ray_token").read_text())
        forget_token(folder)
    assert secrets[0] == secrets[1] != ""


@pytest.mark.parametrize("hidden", ["", "NoDevFiles", "0"])
def test_hidden_gpus_do_not_keep_ray_from_its_logical_ones(started, tmp_path, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    connect(hardware(), token_folder=tmp_path)
    assert started["num_gpus"] == 1
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_with_an_address_that_cluster_is_joined_as_it_is(started, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connect(hardware("hardware.num_nodes=2"), token_folder=tmp_path)
    assert started["address"] == "10.0.0.1:6379"
    assert not {"num_cpus", "num_gpus", "object_store_memory"} & started.keys()  # Ray refuses them
    assert list(tmp_path.iterdir()) == []  # the token is the cluster's


def test_workers_on_every_node_get_the_environment_and_hardware_env_wins(started, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    more = {"OMP_NUM_THREADS": "8", "NCCL_DEBUG": "WARN"}
    connect(hardware(), token_folder=tmp_path, environment=more)
    variables = started["runtime_env"]["env_vars"]
    assert variables["VERL_PLATFORM"] == "cpu"
    assert variables["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


def test_several_nodes_need_a_cluster(started, tmp_path):
    with pytest.raises(ConfigError, match=r"hardware.num_nodes=2, but RAY_ADDRESS is not set"):
        connect(hardware("hardware.num_nodes=2"), token_folder=tmp_path)
    assert not started


def test_relative_paths_are_resolved_where_they_were_given_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "train.parquet").touch()
    given = ["student.path=student", "teacher.path=owner/teacher", "data.train_file=train.parquet", "run_dir=runs/a"]
    config = load_config(given)
    resolved = with_absolute_paths(config)
    assert resolved.student.path == str(tmp_path / "student")
    assert resolved.teacher.path == "owner/teacher"
    assert resolved.data.train_file == str(tmp_path / "train.parquet")
    assert resolved.run_dir == str(tmp_path / "runs" / "a")
    assert config.run_dir == "runs/a"


def test_on_nvidia_gpus_the_variables_of_other_makers_are_gone_before_ray_starts(started, tmp_path, monkeypatch):
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1")
    connect(hardware(), token_folder=tmp_path)
    assert os.environ["ROCR_VISIBLE_DEVICES"] == "0,1"
    connect(load_config(["hardware=h200x8"]).hardware, token_folder=tmp_path)
    assert "ROCR_VISIBLE_DEVICES" not in os.environ


def test_workers_of_a_cluster_get_where_models_lie_and_the_shells_own_defaults(started, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    connect(hardware(), token_folder=tmp_path)
    variables = started["runtime_env"]["env_vars"]
    assert variables["HF_HOME"] == "/shared/hf"
    assert variables["VLLM_LOGGING_LEVEL"] == "INFO"
    assert variables["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    assert "HF_HUB_OFFLINE" not in variables
