"""Each method by its preset, with the real engine on the tiny world: two steps of every stage that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.tensor  # noqa: F401 -- the classes that an optimiser's state is made of

from dgpo.config.load import group_choices, load_config
from dgpo.runs.plain_values import load_plain
from tests.conftest import TinyWorld, read_metrics, run_command

pytestmark = pytest.mark.engine

SMALL = [
    "collect.max_questions=64",
    "distill.max_steps=2",
    "train.batch_size=16",
    "train.mini_batch_size=8",
    "hardware.micro_batch_size=8",
    "train.num_steps=2",
    "train.save_every=2",
]


def run_stages(world: TinyWorld, run_dir: Path, *overrides: str) -> dict[str, list[dict[str, float]]]:
    """Runs every stage of the experiment; returns the metrics of those that train."""
    arguments = [*world.overrides(run_dir, begun=False), *SMALL, *overrides]
    stages = load_config(arguments).stages
    for stage in stages:
        result = run_command("-m", "dgpo", stage, *arguments)
        assert result.returncode == 0, f"{stage}: {result.stderr[-3000:]}"
    return {stage: read_metrics(run_dir / stage / "metrics.jsonl") for stage in stages if stage != "collect"}


def test_gkd_has_no_reward_and_no_critic_only_the_teacher(tiny_world: TinyWorld, tmp_path: Path):
    metrics = run_stages(tiny_world, tmp_path / "run", "experiment=gkd", f"train.init={tiny_world.student}")
    for record in metrics["train"]:
        assert record["teacher/gate_fraction"] == 1
        assert record["actor/pg_loss"] == 0
        assert record["actor/loss"] == pytest.approx(record["actor/teacher_loss"], rel=1e-4)
        assert record["actor/teacher_loss"] > 0
        assert record["actor/grad_norm"] > 0
        assert "critic/vf_loss" not in record


def test_grpo_with_the_token_form(tiny_world: TinyWorld, tmp_path: Path):
    metrics = run_stages(
        tiny_world,
        tmp_path / "run",
        "experiment=dgpo_grpo",
        "stages=[train]",
        f"train.init={tiny_world.student}",
        "train.teacher_term.form=token",
        "train.batch_size=8",
        "train.mini_batch_size=16",  # episodes
    )
    for record in metrics["train"]:
        assert "critic/vf_loss" not in record
        assert record["teacher/num_scored"] >= round(32 * record["teacher/gate_fraction"]) > 0
        # The teacher term gives failed episodes an advantage even where a whole group failed.
        assert record["critic/advantages/max"] > record["critic/advantages/min"]
        assert "actor/teacher_loss" not in record
    optimizer = load_plain(tmp_path / "run/train/checkpoints/global_step_2/actor/optim_world_size_1_rank_0.pt")
    assert {int(state["step"]) for state in optimizer["state"].values()} == {2 * 32 // 16}, "updates of two steps"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", group_choices("experiment"))
def test_an_experiment(experiment: str, tiny_world: TinyWorld, tmp_path: Path):
    metrics = run_stages(tiny_world, tmp_path / "run", f"experiment={experiment}")
    for stage, records in metrics.items():
        assert records, stage
        if stage == "train":
            assert [record["step"] for record in records] == [1, 2]


def one_update(world: TinyWorld, run_dir: Path, *overrides: str) -> dict[str, float]:
    """The metrics of one step with the exact form, repeatable to the last bit."""
    arguments = [
        *world.overrides(run_dir),
        *SMALL,
        "train.mini_batch_size=16",
        "train.num_steps=1",
        "train.save_every=1",
        "hardware.micro_batch_size=4",
        "train.generation_concurrency=1",
        *overrides,
    ]
    result = run_command("-m", "dgpo", "train", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    (record,) = read_metrics(run_dir / "train" / "metrics.jsonl")
    return record


def check_same_update(one: dict[str, float], other: dict[str, float]) -> None:
    assert one["episode/em"] == other["episode/em"], "the two must have played the same episodes"
    for name in ("actor/teacher_loss", "actor/loss", "actor/grad_norm", "critic/grad_norm"):
        assert other[name] == pytest.approx(one[name], rel=1e-3), name


@pytest.mark.slow
def test_two_fsdp_ranks_make_the_update_of_one(tiny_world: TinyWorld, tmp_path: Path):
    """The exact form shards teacher and student, and counts its tokens over all ranks."""
    one = one_update(tiny_world, tmp_path / "one")
    check_same_update(one, one_update(tiny_world, tmp_path / "two", "hardware.gpus_per_node=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["max_tokens_per_gpu=800", "remove_padding=true", "gradient_checkpointing=true", "offload=full"],
        ["gpus_per_node=2", "fsdp_size=1", "offload=idle"],
    ],
)
def test_hardware_settings_do_not_change_the_update(settings: list[str], tiny_world: TinyWorld, tmp_path: Path):
    """Packing by tokens, checkpointing, offload and the size of a shard are about memory alone."""
    one = one_update(tiny_world, tmp_path / "one")
    overrides = [f"hardware.{setting}" for setting in settings]
    check_same_update(one, one_update(tiny_world, tmp_path / "other", *overrides))
