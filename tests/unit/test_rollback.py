"""Rollback on the file system: what becomes the latest checkpoint, what is set aside, what the run goes on with."""

import pytest

from dgpo.config.load import load_config
from dgpo.errors import CollapseError
from dgpo.runs.checkpoints import checkpoint_steps, seal
from dgpo.runs.rollback import (
    after_rollbacks,
    keep_last_good,
    last_good_step,
    num_rollbacks,
    num_to_keep,
    read_events,
    roll_back,
)


@pytest.fixture
def folder(tmp_path):
    """A stage folder with whole checkpoints of steps 2, 4 and 6, and a half-written one of step 5."""
    for step in (2, 4, 5, 6):
        checkpoint = tmp_path / "checkpoints" / f"global_step_{step}"
        (checkpoint / "actor").mkdir(parents=True)
        (checkpoint / "actor" / "weights.pt").write_text(f"weights {step}")
        if step != 5:
            seal(checkpoint, step=step)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("6")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    return tmp_path


def steps_in(folder):
    return checkpoint_steps(folder, "global_step_")


@pytest.mark.parametrize(("first_step", "good"), [(8, 6), (7, 4), (6, 4), (5, 2), (4, 2), (3, 0), (1, 0)])
def test_the_last_good_checkpoint_has_played_sound_episodes(folder, first_step, good):
    """Weights after step s play the episodes of step s + 1, so that one must precede the first sign."""
    assert last_good_step(folder, first_step) == good


def test_a_rollback_keeps_everything_and_resumes_from_the_good_checkpoint(folder):
    event = roll_back(folder, CollapseError("entropy_high: ..", 5))
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert steps_in(folder / "checkpoints") == [2]
    assert steps_in(folder / "rolled_back" / "1") == [4, 6]
    assert len((folder / "rolled_back" / "1" / "metrics.jsonl").read_text().splitlines()) == 7
    assert event == {
        "event": "rollback",
        "rollback": 1,
        "to_step": 2,
        "first_sign_at_step": 5,
        "cause": "entropy_high: ..",
        "checkpoints_set_aside": [4, 6],
        "folder": "rolled_back/1",
    }
    assert read_events(folder) == [event]


def test_without_a_good_checkpoint_the_run_begins_again(folder):
    roll_back(folder, CollapseError("", 2))
    assert not (folder / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
    assert steps_in(folder / "checkpoints") == []


def test_a_second_rollback_has_a_folder_and_an_event_of_its_own(folder):
    roll_back(folder, CollapseError("", 7))
    roll_back(folder, CollapseError("", 4))
    assert [event["to_step"] for event in read_events(folder)] == [4, 2]
    assert steps_in(folder / "rolled_back" / "1") == [6]
    assert steps_in(folder / "rolled_back" / "2") == [4]
    assert num_rollbacks(folder) == 2


def test_every_rollback_lowers_the_actors_learning_rate_and_changes_the_seed(folder):
    config = load_config(
        ["world=tiny", "train.actor_learning_rate=0.1", "train.stability.rollback_learning_rate_scale=.5"]
    )
    assert after_rollbacks(config, folder) is config
    roll_back(folder, CollapseError("", 7))
    once = after_rollbacks(config, folder)
    roll_back(folder, CollapseError("", 7))
    twice = after_rollbacks(config, folder)
    assert [c.train.actor_learning_rate for c in (config, once, twice)] == pytest.approx([0.1, 0.05, 0.025])
    assert len({config.seed, once.seed, twice.seed}) == 3
    assert once.resume
    assert once.train.critic_learning_rate == config.train.critic_learning_rate


def test_the_last_good_checkpoint_is_kept_out_of_reach_of_rotation(folder):
    assert keep_last_good(folder, 7) == 4
    for path in (folder / "checkpoints" / "global_step_4" / "actor").iterdir():
        path.unlink()
    assert (folder / "last_good" / "global_step_4" / "actor" / "weights.pt").read_text() == "weights 4"
    assert keep_last_good(folder, 7) == 4  # again changes nothing
    assert keep_last_good(folder, 2) == 0


def test_enough_checkpoints_are_kept_to_go_back_to():
    config = load_config(["train.stability.action=rollback", "train.save_every=1", "train.keep_last=2"])
    assert num_to_keep(config) == 3 + 5 + 2 + 1
    config.train.save_every = 50
    assert num_to_keep(config) == 2
    config.train.stability.action, config.train.save_every = "warn", 1
    assert num_to_keep(config) == 2
