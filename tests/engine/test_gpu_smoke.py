"""scripts/gpu_smoke.py, rehearsed on the CPU: its steps pass, and it says what was skipped, dropped or killed."""

import argparse
import importlib.util
import json
import sys

import pytest

from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.engine

spec = importlib.util.spec_from_file_location("gpu_smoke", ROOT / "scripts" / "gpu_smoke.py")
gpu_smoke = importlib.util.module_from_spec(spec)
sys.modules["gpu_smoke"] = gpu_smoke
spec.loader.exec_module(gpu_smoke)


def rehearse(folder, steps):
    result = run_command("scripts/gpu_smoke.py", "--cpu", "--steps", steps, "--out", str(folder), timeout_s=1200)
    assert result.returncode == 0, result.stdout
    return {step["name"]: step for step in json.loads((folder / "gpu-smoke.json").read_text())["steps"]}


def test_what_needs_torch_and_transformers_only(tmp_path):
    steps = rehearse(tmp_path, "1,2,6")
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(steps, "pass")
    assert sum(len(step["checks"]) for step in steps.values()) > 20
    assert steps["kernels"]["numbers"]["KL from a rounded position table"] > 0


@pytest.mark.slow
def test_what_needs_vllm_and_verl(tmp_path):
    steps = rehearse(tmp_path, "3,4,5")
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(steps, "pass")


def one(folder, *, device="cpu", left=100.0, **change):
    step = gpu_smoke.Step(**{"number": 1, "name": "environment", "usual": 10, "limit": 60, "needs": (), **change})
    options = argparse.Namespace(device=device, out=folder)
    return gpu_smoke._run_step(step, options, folder, left)


def test_a_step_whose_package_is_missing_is_skipped_with_the_reason(tmp_path):
    result = one(tmp_path, needs=("no_such_package",))
    assert (result["status"], result["reason"]) == ("skip", "not installed: no_such_package")


def test_the_budget_drops_what_it_has_no_time_for(tmp_path):
    assert one(tmp_path, device="cuda", left=5)["status"] == "dropped"


def test_a_step_that_takes_too_long_is_killed(tmp_path):
    result = one(tmp_path, limit=0.1)
    assert result["status"] == "fail"
    assert result["reason"].startswith("not done after")
    assert result["seconds"] < 30


def test_a_step_that_raises_says_what(tmp_path):
    result = one(tmp_path, name="no_such_step")
    assert result["status"] == "fail"
    assert "no_such_step" in result["reason"]


def test_a_step_that_leaves_a_process_behind_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_smoke, "_left_over", lambda there: {1: "sleep"})
    result = one(tmp_path)
    assert (result["status"], result["reason"]) == ("fail", "it left processes behind: sleep")


def test_what_a_session_of_its_own_leaves_is_seen():
    there = gpu_smoke._descendants()
    process = gpu_smoke.subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert {pid: name for pid, name in gpu_smoke._descendants().items() if pid not in there} == {
            process.pid: "sleep"
        }
    finally:
        process.kill()
        process.wait()
