"""Resumed = straight through: runs that are killed at random points end with the same metrics and the same weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from dgpo.agent.trajectory import Trajectory, read_trajectories
from tests.conftest import TinyWorld, read_metrics, run_command
from tests.engine.killing import has_step, start_and_kill
from tests.engine.same_run import assert_same_run, repeatable

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_STEPS = 6
# Batches of 16 from 40 questions: the order of the second and third pass must go on too. An adaptive KL controller has
# a state of its own. Validation after steps 3 and 6, of which only 6 is saved anyway.
SETTINGS = [
    "train.batch_size=16",
    "train.mini_batch_size=8",
    "hardware.micro_batch_size=8",
    f"train.num_steps={NUM_STEPS}",
    "train.save_every=2",
    "train.validate_every=3",
    "train.teacher_term.form=reward",
    "train.init_kl_coef=0.001",
    "hardware.verl.algorithm.kl_ctrl.type=adaptive",
    "hardware.verl.algorithm.kl_ctrl.horizon=100",
    "train.generation_concurrency=1",
]


@pytest.fixture(scope="module")
def questions(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """40 training and 8 validation questions."""
    folder = tmp_path_factory.mktemp("questions")
    rows = pq.read_table(tiny_world.folder / "data" / "train.parquet")
    pq.write_table(rows.slice(0, 40), folder / "train.parquet")
    pq.write_table(rows.slice(40, 8), folder / "validation.parquet")
    return [f"data.train_file={folder / 'train.parquet'}", f"data.validation_file={folder / 'validation.parquet'}"]


@pytest.fixture(scope="module")
def straight(tiny_world: TinyWorld, questions: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = run_command("-m", "dgpo", "train", *tiny_world.overrides(run_dir), *questions, *SETTINGS)
    assert result.returncode == 0, result.stderr[-3000:]
    return run_dir / "train"


def test_what_the_straight_run_keeps(straight: Path):
    """Step 6 is the last and step 5 is saved by nothing; the best of the validated ones is 3 or 6."""
    records = read_metrics(straight / "metrics.jsonl")
    assert [record["step"] for record in records if "validation/em" in record] == [3, 6]
    best = max((record["validation/em"], record["step"]) for record in records if "validation/em" in record)[1]
    kept = sorted(int(path.name.rpartition("_")[2]) for path in (straight / "checkpoints").glob("global_step_*"))
    assert kept == sorted({4, 6, best})
    coefficients = [record["actor/reward_kl_penalty_coeff"] for record in records]
    assert len(set(coefficients)) == NUM_STEPS, "the controller adapts"


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_random_points_and_resumed_it_is_the_straight_run(
    tiny_world: TinyWorld, questions: list[str], straight: Path, tmp_path: Path, draw: int
):
    """Two kills, each at a random step and a random moment of it: play, updates, saving, validation, weight update."""
    rng = random.Random(draw)
    records = read_metrics(straight / "metrics.jsonl")
    command = ["train", *tiny_world.overrides(tmp_path / "run"), *questions, *SETTINGS]
    folder, log = tmp_path / "run" / "train", tmp_path / "log"
    for step in sorted(rng.sample(range(NUM_STEPS), 2)):
        delay_s = rng.uniform(0, 1.2 * records[step]["timing_s/step"])
        resume = ["resume=true"] if folder.exists() else []
        start_and_kill([*command, *resume], log, has_step(folder / "metrics.jsonl", step), delay_s=delay_s)
        print(f"draw {draw}: killed {delay_s:.2f} s after step {step}")
    result = run_command("-m", "dgpo", *command, "resume=true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder, straight)


def test_killed_between_saving_and_its_record(
    tiny_world: TinyWorld, questions: list[str], straight: Path, tmp_path: Path
):
    """The checkpoint of step 6 holds the step's metrics, and the resumed run makes up for its validation."""
    command = ["train", *tiny_world.overrides(tmp_path / "run"), *questions, *SETTINGS]
    folder, log = tmp_path / "run" / "train", tmp_path / "log"
    saved = folder / "checkpoints" / "global_step_6" / "manifest.json"
    start_and_kill(command, log, saved.exists)
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    result = run_command("-m", "dgpo", *command, "resume=true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder, straight)


def test_damaged_checkpoints_are_skipped_and_the_one_before_is_used(
    tiny_world: TinyWorld, questions: list[str], straight: Path, tmp_path: Path
):
    folder = tmp_path / "run" / "train"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "model")
    newest = folder / "checkpoints" / "global_step_6" / "critic" / "model_world_size_1_rank_0.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    command = ["train", *tiny_world.overrides(tmp_path / "run"), *questions, *SETTINGS]
    result = run_command("-m", "dgpo", *command, "resume=true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "global_step_6 is skipped: critic/model_world_size_1_rank_0.pt has changed" in result.stderr
    assert "continues from" in result.stderr
    assert_same_run(folder, straight)


def test_a_run_goes_on_with_another_number_of_gpus(
    tiny_world: TinyWorld, questions: list[str], straight: Path, tmp_path: Path
):
    """From one rank to two: what the ranks sum up differs in its last digits, and so do the weights after that."""
    folder = tmp_path / "run" / "train"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "global_step_6")
    two = ["hardware.gpus_per_node=2", "hardware.micro_batch_size=4"]
    command = ["train", *tiny_world.overrides(tmp_path / "run"), *questions, *SETTINGS, *two]
    result = run_command("-m", "dgpo", *command, "resume=true", timeout_s=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "which 1 GPUs wrote, on 2" in result.stderr
    ours, theirs = (repeatable(run)[-1] for run in (folder, straight))
    assert ours["episode/num_policy_tokens"] == theirs["episode/num_policy_tokens"]
    assert ours["actor/lr"] == theirs["actor/lr"]
    mine, expected = (load_file(run / "model" / "model.safetensors") for run in (folder, straight))
    assert max((mine[name] - expected[name]).abs().max().item() for name in expected) < 1e-4


@pytest.mark.parametrize("stage", ["collect", "test"])
def test_a_stage_that_plays_episodes_goes_on_to_the_same_ones(tiny_world: TinyWorld, tmp_path: Path, stage: str):
    """Sampled at temperature 1 or greedy: other questions are in flight after a resume, and no episode changes."""
    data, questions = tiny_world.folder / "data", 150
    of_stage = {
        "collect": [f"collect.max_questions={questions}", "collect.temperature=1"],
        "test": [
            f"test.max_questions={questions}",
            f"test.models.student={tiny_world.student}",
            f"data.test_files.real={data / 'test.parquet'}",
        ],
    }[stage]
    name = {"collect": "collect/trajectories.jsonl", "test": "test/student/trajectories.jsonl"}[stage]

    def command(run_dir: Path) -> list[str]:
        return [stage, *tiny_world.overrides(run_dir), *of_stage]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_command("-m", "dgpo", *command(straight)).returncode == 0
    partial = killed / f"{name}.partial"
    for share in (0.2, 0.6):
        count = round(share * questions)
        resume = ["resume=true"] if killed.exists() else []
        start_and_kill([*command(killed), *resume], tmp_path / "log", lambda n=count: num_lines(partial) >= n)
    kept = partial.read_text().split("\n")[:-1]
    assert run_command("-m", "dgpo", *command(killed), "resume=true").returncode == 0
    ours, theirs = (list(read_trajectories(run / name)) for run in (killed, straight))
    assert len(ours) == questions
    assert set(kept) <= {trajectory.to_json() for trajectory in ours}, "nothing is played twice"
    assert [played(trajectory) for trajectory in ours] == [played(trajectory) for trajectory in theirs]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def played(trajectory: Trajectory) -> tuple[object, ...]:
    """All of an episode but how long its searches took, and the last digits of its log-probs."""
    found = [[document["id"] for document in search.documents] for search in trajectory.searches]
    return (trajectory.episode_id, trajectory.response_ids, trajectory.response_mask, trajectory.status, found)
