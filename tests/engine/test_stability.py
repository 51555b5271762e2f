"""What happens to a real run when something goes wrong with its policy, its reward or its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyWorld, read_metrics, run_command

pytestmark = pytest.mark.engine

SMALL = [
    "train.batch_size=16",
    "train.mini_batch_size=8",
    "hardware.micro_batch_size=8",
    "train.save_every=1",
]
TIMEOUT_S = 900  # a rollback starts the engine twice
EARLY_WARNINGS = [  # what docs/stability.md promises of every PPO run that measures the KL to its initial policy
    "actor/entropy",
    "actor/kl_to_init",
    "actor/pg_clipfrac",
    "actor/ppo_kl",
    "actor/grad_norm",
    "actor/skipped_updates",
    "critic/grad_norm",
    "critic/skipped_updates",
    "critic/vf_explained_var",
    "episode/em",
    "episode/answered",
    "episode/error",
    "episode/search_failed",
    "episode/invalid_action_rate",
    "episode/truncated_turn_share",
    "episode/num_policy_tokens",
    "episode/num_response_tokens",
    "episode/response_fill",
    "episode/repeated_token_share",
    "rollout/log_prob_diff_max",
]


def train(world: TinyWorld, run_dir: Path, *overrides: str):
    return run_command("-m", "dgpo", "train", *world.overrides(run_dir), *SMALL, *overrides, timeout_s=TIMEOUT_S)


def extended(world: TinyWorld) -> list[str]:
    """Both worked examples: what a resumed run must be given again."""
    return [
        "retriever.url=http://127.0.0.1:9",
        "retriever.backend=examples.jsonl_search:JsonlSearch",
        f"retriever.backend_options.path={world.folder / 'corpora'}",
        "train.reward=examples.format_reward:reward",
        "train.actor_warmup_steps=0",  # a first step at rate 0 would leave the policy at its start
        "train.stability.measure_init_kl=true",
    ]


@pytest.fixture(scope="module")
def stopped_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory):
    """Both worked examples, and an entropy floor that no policy reaches: two steps, then an alarm that stops the run.

    The url leads nowhere: with a backend of its own a run needs no server.
    """
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    result = train(
        tiny_world,
        run_dir,
        *extended(tiny_world),
        "train.num_steps=5",
        "train.save_every=100",
        "train.stability.action=stop",
        "train.stability.patience=2",
        "train.stability.min_entropy=100",
    )
    return result, run_dir / "train"


def test_the_worked_examples_train(stopped_run):
    records = read_metrics(stopped_run[1] / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        parts = [record[f"episode/reward_{name}"] for name in ("em", "format", "searches")]
        assert record["critic/score/mean"] == pytest.approx(sum(parts), abs=1e-6)
        assert record["episode/reward_em"] == record["episode/em"]
        assert parts[1] > 0
    assert sum(record["episode/num_searches"] for record in records) > 0
    assert sum(record["episode/hit"] for record in records) > 0


def test_the_teachers_gate_is_correctness_and_not_the_reward(stopped_run):
    """Every episode in good form earns a bonus; the wrong ones are gated all the same."""
    for record in read_metrics(stopped_run[1] / "metrics.jsonl"):
        assert record["teacher/gate_fraction"] == pytest.approx(1 - record["episode/em"])


def test_every_early_warning_is_in_every_step(stopped_run):
    first, second = read_metrics(stopped_run[1] / "metrics.jsonl")
    for record in (first, second):
        assert [name for name in EARLY_WARNINGS if name not in record] == []
        assert record["actor/skipped_updates"] == record["episode/error"] == 0
    assert first["actor/kl_to_init"] == pytest.approx(0, abs=1e-6)
    assert second["actor/kl_to_init"] != 0


def test_an_alarm_stops_the_run_saved_with_its_name_as_the_last_line(stopped_run):
    result, folder = stopped_run
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("dgpo train: entropy_low: actor/entropy=")
    assert "at step 2, limit 100 (first sign at step 1)" in last
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    (alarm,) = [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["rule"], alarm["step"]) == ("entropy_low", 2)
    assert "ALARM entropy_low" in result.stdout


@pytest.mark.slow
def test_a_stopped_run_goes_on_when_resumed(stopped_run, tiny_world: TinyWorld):
    _, folder = stopped_run
    result = train(tiny_world, folder.parent, *extended(tiny_world), "train.num_steps=4", "resume=true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_collapse_is_rolled_back_and_stops_when_it_comes_again(
    tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory
):
    """A learning rate of 0.3 destroys the policy in a step or two; half of it does so again."""
    folder = tmp_path_factory.mktemp("collapse") / "run" / "train"
    result = train(
        tiny_world,
        folder.parent,
        "train.num_steps=30",
        "train.actor_learning_rate=0.3",
        "train.max_grad_norm=100",
        "train.stability.action=rollback",
        "train.stability.max_rollbacks=1",
        "train.stability.patience=2",
        "train.stability.window=2",
    )
    assert result.returncode == 1, result.stderr[-3000:]
    (event,) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["rollback"]) == ("rollback", 1)
    assert event["to_step"] <= max(0, event["first_sign_at_step"] - 2)
    aside = folder / event["folder"]
    assert [(aside / f"global_step_{step}" / "actor").is_dir() for step in event["checkpoints_set_aside"]]
    before = read_metrics(aside / "metrics.jsonl")
    after = read_metrics(folder / "metrics.jsonl")
    assert len(before) > event["to_step"]
    assert [record["step"] for record in after] == list(range(1, len(after) + 1))
    assert after[: event["to_step"]] == before[: event["to_step"]]
    first_again = after[event["to_step"]]
    assert first_again["actor/lr"] == pytest.approx(before[event["to_step"]]["actor/lr"] / 2)
    assert first_again["episode/num_policy_tokens"] != before[event["to_step"]]["episode/num_policy_tokens"]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("dgpo train: ")
    assert "Saved after step" in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "messages"),
    [
        ("nan_in_step_2", ["rm_scores is nan on 1 tokens of 1 of 16 episodes (0000002-000000", "train.reward"]),
        ("error_in_step_2", ["100% of this step's episodes failed", "raised KeyError: 'no such thing'"]),
    ],
)
def test_a_reward_that_goes_wrong_stops_the_run_before_the_update(
    tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory, reward: str, messages: list[str]
):
    folder = tmp_path_factory.mktemp(reward) / "run" / "train"
    result = train(tiny_world, folder.parent, "train.num_steps=4", f"train.reward=tests.engine.bad_rewards:{reward}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    for message in messages:
        assert message in last
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
