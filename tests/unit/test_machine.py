"""What a machine must have before a stage starts on it: each missing thing is one line, said at once."""

import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config
from dgpo.errors import ConfigError
from dgpo.hardware import machine
from dgpo.hardware.machine import Machine, VisibleGpu, check_machine, memory_limit, visible_gpus

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "collect",
    "distill",
    "train",
    "test",
    "arcap",
    "quickstart",
    f"own {ROOT / 'docs'}",
    "reproduce table=main",
]
GIB = 2**30
H200 = VisibleGpu("NVIDIA H200", 139.8 * GIB, 139.0 * GIB, "580.65.06")
NODE = Machine([H200] * 8, 64, 2000 * GIB, 1000 * GIB, "gcc", Path("/usr/include/python3.11"))


@pytest.fixture
def on(monkeypatch):
    """Makes a machine the one that is looked at, and checks a stage on it."""
    monkeypatch.setattr(machine, "_check_flash_attention", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def check(there, stage="train", *overrides):
        monkeypatch.setattr(machine, "this_machine", lambda: there)
        check_machine(load_config(overrides), stage)

    return check


@pytest.mark.parametrize("environment", [{"HOME": "/dev/null"}, {"XDG_CACHE_HOME": "/proc/version"}])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_home_that_cannot_be_written_to_is_told_at_once(monkeypatch, capsys, environment, command):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*command.split(), "world=tiny", "hardware=cpu", "dry_run=true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be written to (HOME=" in error


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere", "127.0.0.1:port"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_ray_that_is_gone_is_told_at_once_and_by_the_variables_name(monkeypatch, capsys, address, command):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main([*command.split(), "world=tiny", "hardware=cpu", "dry_run=true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"RAY_ADDRESS={address}: no Ray answers there (" in error


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_too_deep_for_sockets_is_told_by_its_variable(monkeypatch, name):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(name, "/tmp/" + "x" * (machine.MAX_SOCKET_BYTES - len(machine.LONGEST_SOCKET) - 5))
    config = load_config(["world=tiny", "hardware=cpu"])
    machine.check_start(config, "train")
    monkeypatch.setenv(name, os.environ[name] + "x")
    with pytest.raises(ConfigError, match=f"^{name}=/tmp/x.* 108 bytes long, and 107 are allowed: set RAY_TMPDIR"):
        machine.check_start(config, "train")


def test_a_ray_that_answers_is_let_be(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (f"127.0.0.1:{server.getsockname()[1]}", "auto"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            machine.check_start(load_config(["world=tiny", "hardware=cpu"]), "train")


def test_a_whole_node_is_enough(on):
    for stage in ("collect", "distill", "train", "test", "ask"):
        on(NODE, stage)


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (
            {"gpus": []},
            "train",
            "hardware.gpus_per_node=8, but nvidia-smi finds no GPUs on this machine: use hardware=cpu",
        ),
        ({"gpus": [H200] * 4}, "distill", "finds 4 GPUs"),
        ({"gpus": []}, "ask", "finds no GPUs"),
        ({"gpus": [replace(H200, memory=79 * GIB)] * 8}, "train", "set hardware.gpu to what it is"),
        ({"gpus": [replace(H200, driver="570.86.15")] * 8}, "train", "driver is 570.86.15"),
        ({"gpus": [replace(H200, free=107 * GIB)] * 8}, "collect", "hardware.engine.gpu_memory_utilization_alone=0.75"),
        ({"gpus": [replace(H200, free=60 * GIB)] * 8}, "train", "hardware.engine.gpu_memory_utilization=0.41 or less"),
        ({"compiler": None}, "train", "no C compiler"),
        ({"headers": None}, "collect", "no Python.h"),
        ({"shared_memory": 64e6}, "train", "/dev/shm has 0.06 GB"),
        ({"cores": 16}, "train", "this machine has 16 CPUs, and Ray places 34"),
    ],
)
def test_what_is_missing_is_one_line_with_what_to_do(on, change, stage, message):
    with pytest.raises(ConfigError) as caught:
        on(replace(NODE, **change), stage)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_that_a_message_names_are_enough(on):
    on(replace(NODE, cores=16), "train", "hardware.logical_cpus=34")
    taken = replace(NODE, gpus=[replace(H200, free=107 * GIB)] * 8)
    on(taken, "collect", "hardware.engine.gpu_memory_utilization_alone=0.75")


def test_stages_that_only_play_make_do_with_the_gpus_that_are_there(on):
    on(replace(NODE, gpus=[H200]), "collect")


def test_an_old_driver_with_nvidias_compatibility_package_will_do(on, monkeypatch):
    monkeypatch.setattr(machine, "_libcuda_version", lambda: 13000)
    on(replace(NODE, gpus=[replace(H200, driver="570.86.15")] * 8))


def test_plans_for_other_machines_and_stages_of_a_cluster_are_not_checked(on, monkeypatch):
    on(replace(NODE, gpus=[]), "train", "dry_run.assume=h200x8")
    on(replace(NODE, gpus=[]), "train", "hardware=cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    on(replace(NODE, gpus=[]), "train")


def test_flash_attention_that_is_not_installed_is_refused_where_it_would_train(monkeypatch):
    monkeypatch.setattr(machine, "this_machine", lambda: NODE)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"flash-attn is not installed.*hardware.attention=sdpa"):
        check_machine(load_config([]), "train")
    check_machine(load_config([]), "collect")
    check_machine(load_config(["hardware.attention=sdpa"]), "train")


def test_nvidia_smi_is_asked_for_the_chosen_gpus(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/bash\necho \"$*\" >&2\necho 'NVIDIA H100, 80GB, 81559, 81000, 580.65.06'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert visible_gpus() == [VisibleGpu("NVIDIA H100, 80GB", 81559 * 2**20, 81000 * 2**20, "580.65.06")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_memory_is_the_machines_or_its_control_groups_where_that_is_less(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    assert memory_limit(tmp_path) == 1000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4096\n")
    assert memory_limit(tmp_path) == 4096
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == 1000 * 1024


@pytest.mark.parametrize("command", ["train", "collect", "distill"])
def test_without_a_gpu_a_command_says_so_before_it_looks_at_anything_else(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "visible_gpus", list)
    assert main([command, "pair=qwen3b_05b", f"run_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "use hardware=cpu" in error


def test_it_says_so_within_two_seconds():
    """In CPU time, so that a busy machine is no regression."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "dgpo", "train", "pair=qwen3b_05b"]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 2
    assert "use hardware=cpu" in result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
