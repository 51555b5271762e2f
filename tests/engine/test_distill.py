"""Distillation for real: ranks over Ray, a process that is killed, and the student's own episodes through vLLM."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgpo.agent.trajectory import Trajectory, read_trajectories, write_trajectories
from dgpo.coldstart.distill import distill, distill_rank
from dgpo.coldstart.ranks import run_on_ranks
from dgpo.coldstart.trainer import DistillationTrainer
from dgpo.runs.artifacts import write_manifest
from dgpo.tinyworld.build import WorldSettings, real_world
from dgpo.tinyworld.oracle import oracle_examples
from tests.conftest import ROOT, read_metrics, run_command
from tests.distill_stage import overrides, varied_examples, write_stage

pytestmark = pytest.mark.engine

# A small rate: Adam turns rounding errors of gradients near zero into steps of the rate's size.
STEPS = ["distill.max_steps=9", "distill.held_out_share=0.1", "distill.evaluate_every=3", "distill.learning_rate=1e-3"]


def weights(folder):
    return load_file(folder / "run" / "distill" / "model" / "model.safetensors")


def losses(folder):
    lines = read_metrics(folder / "run" / "distill" / "metrics.jsonl")
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


def assert_same_training(folder, expected, *, tolerance):
    assert losses(folder) == pytest.approx(losses(expected), abs=tolerance)
    assert weights(folder).keys() == weights(expected).keys()
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Trained straight through, by one rank in this process."""
    folder = tmp_path_factory.mktemp("one_rank")
    distill(write_stage(folder, STEPS, examples=varied_examples(35)))
    return folder


@pytest.mark.parametrize("sharding", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one_does(one_rank, tmp_path, sharding):
    write_stage(tmp_path, examples=varied_examples(35))
    more = [*STEPS, "hardware.gpus_per_node=2", f"distill.sharding={sharding}", "distill.micro_batch_size=3"]
    result = run_command("-m", "dgpo", "distill", *overrides(tmp_path, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_training(tmp_path, one_rank, tolerance=1e-5)


def local_share(config, *, rank, num_ranks):
    """The share of the student's parameters that this rank holds while it trains."""
    shares = []
    original = DistillationTrainer._clip_grad_norm

    def watched(self, model):
        whole = sum(parameter.numel() for parameter in model.parameters())
        shares.append(sum(parameter.to_local().numel() for parameter in model.parameters()) / whole)
        return original(self, model)

    DistillationTrainer._clip_grad_norm = watched
    distill_rank(config, rank=rank, num_ranks=num_ranks)
    return shares


@pytest.mark.slow
def test_full_sharding_halves_what_each_of_two_ranks_holds(tmp_path):
    more = [*STEPS, "hardware.gpus_per_node=2", "distill.sharding=full"]
    config = write_stage(tmp_path, more, examples=varied_examples(35))
    folder = tmp_path / "run" / "distill"
    folder.mkdir()
    shares = run_on_ranks(local_share, config, folder=folder)
    assert shares == pytest.approx([0.5] * 9, abs=0.01)


@pytest.mark.slow
def test_a_failing_rank_ends_the_run_with_its_own_error(tmp_path):
    write_stage(tmp_path)
    header = b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'  # three numbers in eight bytes
    (tmp_path / "student" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    result = run_command("-m", "dgpo", "distill", *overrides(tmp_path, "hardware.gpus_per_node=2"))
    assert result.returncode == 2
    assert "model.safetensors is no whole file of weights" in result.stderr


def test_a_killed_run_resumes_to_the_same_result(one_rank, tmp_path):
    config = write_stage(tmp_path, STEPS, examples=varied_examples(35))
    slow = "import time; from dgpo.coldstart.trainer import DistillationTrainer as T; step = T.training_step\n"
    slow += "T.training_step = lambda *a: (time.sleep(0.3), step(*a))[1]\n"
    slow += "import sys; from dgpo.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", slow, "distill", *overrides(tmp_path, *STEPS)]
    saved = tmp_path / "run" / "distill" / "checkpoints" / "checkpoint-6" / "manifest.json"
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not saved.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "distill" / "model").exists()
    config.resume = True
    distill(config)
    assert_same_training(tmp_path, one_rank, tolerance=1e-6)


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_two(one_rank, tmp_path, monkeypatch):
    """From the checkpoint after step 6, the process having ended in step 9."""
    config = write_stage(tmp_path, STEPS, examples=varied_examples(35))
    step = DistillationTrainer.training_step

    def ends_in_step_9(self, *arguments, **named):
        if self.state.global_step == 8:
            raise InterruptedError
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", ends_in_step_9)
        with pytest.raises(InterruptedError):
            distill(config)
    more = [*STEPS, "hardware.gpus_per_node=2", "distill.micro_batch_size=3", "resume=true"]
    result = run_command("-m", "dgpo", "distill", *overrides(tmp_path, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "continues from" in result.stderr + result.stdout
    assert_same_training(tmp_path, one_rank, tolerance=1e-5)


@pytest.fixture(scope="module")
def own_episodes(tiny_world, tmp_path_factory):
    """DistiLLM in the tiny world, with a threshold and a buffer at which all three sources occur in ten steps."""
    run = tmp_path_factory.mktemp("distillm")
    settings = WorldSettings(**json.loads((tiny_world.folder / "world.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.folder / "tokenizer")
    world, train_isos, _ = real_world(settings)
    examples = oracle_examples(world, train_isos, tokenizer, count=200, template=settings.prompt_template, seed=3)
    trajectories = [
        Trajectory(
            str(i), e.prompt_ids, e.response_ids, e.response_mask, [0.0] * len(e.response_ids), [], [], "x", "answered"
        )
        for i, e in enumerate(examples)
    ]
    write_trajectories(run / "collect" / "episodes.jsonl", trajectories)
    write_manifest(run / "collect", stage="collect", inputs={}, config={}, counts={}, seed=0)
    result = run_command(
        "-m",
        "dgpo",
        "distill",
        *tiny_world.overrides(run),
        f"distill.init={tiny_world.folder / 'models' / 'student'}",
        "distill.loss=distillm",
        "distill.batch_size=16",
        "distill.max_steps=10",
        "distill.evaluate_every=5",
        "distill.held_out_share=0.1",
        "distill.learning_rate=1e-3",
        "distill.student_episodes.initial_threshold=0.8",
        "distill.student_episodes.buffer_size=32",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return run / "distill"


def test_distillm_trains_on_the_teachers_the_students_and_replayed_episodes(own_episodes):
    lines = read_metrics(own_episodes / "metrics.jsonl")
    last = [line for line in lines if "loss" in line][-1]
    assert min(last["sgo/fresh_steps"], last["sgo/replay_steps"], last["sgo/teacher_steps"]) >= 1
    assert last["sgo/fresh_steps"] + last["sgo/replay_steps"] + last["sgo/teacher_steps"] == 10
    assert last["sgo/episodes"] == 16 * last["sgo/fresh_steps"]
    assert last["sgo/buffer_size"] == 32
    assert last["sgo/failed_searches"] == 0
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 5, 10]
    assert (own_episodes / "model" / "model.safetensors").exists()
    assert not (own_episodes / "student_weights").exists()


def test_the_students_episodes_search_and_mask_what_it_found(own_episodes):
    files = sorted((own_episodes / "student_episodes").glob("*.jsonl"))
    trajectories = [t for path in files for t in read_trajectories(path)]
    assert len({t.episode_id for t in trajectories}) == len(trajectories)
    searched = [t for t in trajectories if t.searches and t.status == "answered"]
    assert searched
    for trajectory in searched:
        own = [i for turn in trajectory.turns for i in range(turn.start, turn.end)]
        assert [i for i, mask in enumerate(trajectory.response_mask) if mask] == own
        assert len(own) < len(trajectory.response_ids)


def test_the_student_plays_with_the_weights_of_its_step(own_episodes, tiny_world):
    """The first play is the initial model's; a later one, from weights loaded into the running engine, is not."""
    files = sorted((own_episodes / "student_episodes").glob("*.jsonl"))
    initial = AutoModelForCausalLM.from_pretrained(tiny_world.folder / "models" / "student")
    first, last = (gap(initial, next(read_trajectories(path))) for path in (files[0], files[-1]))
    assert files[0].name.startswith("step_000001")
    assert first < 1e-3 < last


def gap(model, trajectory):
    """The distance of the log-probs that the engine sampled with from the model's."""
    ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0, len(trajectory.prompt_ids) - 1 : -1]
    own = torch.tensor(trajectory.response_mask, dtype=torch.bool)
    values = log_probs.gather(-1, torch.tensor(trajectory.response_ids)[:, None])[:, 0]
    return (values - torch.tensor(trajectory.log_probs))[own].abs().max()
