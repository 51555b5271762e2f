"""Stages that are asked to stop by a signal: they save what they have, exit with 75, and go on where they were."""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dgpo.agent.trajectory import read_trajectories
from dgpo.coldstart.distill import distill
from tests.conftest import ROOT, read_metrics, run_command
from tests.distill_stage import overrides, varied_examples, write_stage
from tests.engine.killing import has_step, wait_until
from tests.engine.same_run import assert_same_run

pytestmark = pytest.mark.engine

STEPS = ["distill.max_steps=8", "distill.evaluate_every=4", "distill.learning_rate=1e-3"]
# What a script defines, Ray sends to the ranks as it stands.
SLOWED_DOWN = """
import functools, sys
import dgpo.coldstart.distill as stage

def slowed(work, *arguments, **ranks):
    import time
    from dgpo.coldstart.trainer import DistillationTrainer as trainer
    step = trainer.training_step
    trainer.training_step = lambda *arguments: (time.sleep(0.3), step(*arguments))[1]
    return work(*arguments, **ranks)

run_on_ranks = stage.run_on_ranks
stage.run_on_ranks = lambda work, *arguments, **more: run_on_ranks(functools.partial(slowed, work), *arguments, **more)
from dgpo.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def stop_once(holds, command, log):
    """Runs the command and asks it to stop as soon as `holds()`; returns its exit code and what it said."""
    with log.open("wb") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        wait_until(process, holds)
        process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=200)
    return code, log.read_text()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_distillation_saves_between_two_checkpoints_and_continues_to_the_same_model(tmp_path, ranks):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    more = [*STEPS, f"hardware.gpus_per_node={ranks}"]
    distill(write_stage(straight, more, examples=varied_examples(35)))
    write_stage(stopped, examples=varied_examples(35))
    metrics = stopped / "run" / "distill" / "metrics.jsonl"
    command = [sys.executable, "-c", SLOWED_DOWN, "distill", *overrides(stopped, *more)]
    code, error = stop_once(has_step(metrics, 2), command, tmp_path / "log")
    assert code == 75, error
    step = len(read_metrics(metrics))
    assert f"saved after step {step} of 8; resume=true continues" in error
    assert 2 <= step < 8
    assert not (stopped / "run" / "distill" / "stop_requested").exists()
    distill(write_stage(stopped, [*more, "resume=true"], examples=varied_examples(35)))
    ours, theirs = (load_file(f / "run" / "distill" / "model" / "model.safetensors") for f in (stopped, straight))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5 if ranks > 1 else 0)


def test_a_collection_that_is_asked_to_stop_keeps_its_episodes_and_plays_only_the_others(tiny_world, tmp_path):
    arguments = [*tiny_world.overrides(tmp_path / "run"), "collect.max_questions=400", "hardware.engine.concurrency=8"]
    partial = tmp_path / "run" / "collect" / "trajectories.jsonl.partial"
    command = [sys.executable, "-m", "dgpo", "collect", *arguments]
    code, error = stop_once(lambda: partial.exists() and partial.stat().st_size > 20_000, command, tmp_path / "log")
    assert code == 75, error
    assert "dgpo collect: ended by SIGUSR1; resume=true continues" in error.splitlines()
    kept = partial.read_text().splitlines()
    assert 0 < len(kept) < 400
    result = run_command(*command[1:], "resume=true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(list(read_trajectories(tmp_path / "run" / "collect" / "trajectories.jsonl"))) == 400


@pytest.mark.slow
def test_rl_saves_after_the_step_in_progress_and_continues_to_the_same_model(tiny_world, tmp_path):
    small = ["train.num_steps=4", "train.batch_size=16", "train.mini_batch_size=8", "hardware.micro_batch_size=8"]
    small += ["train.save_every=4", "train.generation_concurrency=1"]
    straight = run_command("-m", "dgpo", "train", *tiny_world.overrides(tmp_path / "straight"), *small)
    assert straight.returncode == 0, straight.stderr[-2000:]
    folder = tmp_path / "stopped" / "train"
    command = [sys.executable, "-m", "dgpo", "train", *tiny_world.overrides(tmp_path / "stopped"), *small]
    code, output = stop_once(has_step(folder / "metrics.jsonl", 1), command, tmp_path / "log")
    assert code == 75, output[-2000:]
    step = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 1 <= step < 4
    assert f"dgpo train: stopped on request, saved after step {step:.0f} of 4; resume=true continues" in output
    result = run_command(*command[1:], "resume=true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_run(folder, tmp_path / "straight" / "train")
