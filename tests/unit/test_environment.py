"""`hardware.env` where only the start of a process reads it: the command line starts itself again, once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dgpo.__main__ as command_line
from dgpo.config.schema import HardwareConfig
from dgpo.engines.environment import restart_with_environment

SEEN = "import os; from dgpo.__main__ import main; code = main(); print(os.environ.get('MALLOC_ARENA_MAX')); exit(code)"


def test_a_command_runs_with_what_the_c_library_reads_at_a_start() -> None:
    command = [sys.executable, "-c", SEEN, "report", 'hardware.env.MALLOC_ARENA_MAX="2"', "run_dir=there/is/none"]
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "there/is/none" in result.stderr, "the command itself ran, with its arguments"
    assert result.stdout.splitlines()[-1] == "2"


def test_it_starts_again_only_for_such_a_variable_and_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: starts.append(environment))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    restart_with_environment(HardwareConfig(env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}))
    assert not starts
    restart_with_environment(HardwareConfig(env={"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576"}))
    assert [each["MALLOC_MMAP_THRESHOLD_"] for each in starts] == ["1048576"]


def test_a_call_from_python_never_replaces_its_process(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the caller's process would be gone"))
    assert command_line.main(["report", 'hardware.env.MALLOC_ARENA_MAX="3"', "run_dir=there/is/none"]) == 1
    assert "there/is/none" in capsys.readouterr().err
