"""DistiLLM's schedule and replay buffer, on sequences worked by hand from the authors' finetune.py."""

import random

import pytest

from dgpo.coldstart.examples import TrainingExample
from dgpo.coldstart.replay import AdaptiveSchedule, ReplayBuffer


def schedule(threshold=0.0):
    return AdaptiveSchedule(threshold, increment=0.1, min_rise=0.1)


def thresholds(losses):
    state, seen = schedule(), []
    for loss in losses:
        state = state.observe(loss)
        seen.append(state.threshold)
    return seen


def test_a_rise_of_the_held_out_loss_raises_the_threshold_and_the_level():
    """As released: 1.0 is the level; 1.05 is no rise; 1.1 is, and the new level; 1.15 is none above it; 1.25 is."""
    assert thresholds([1.0, 1.05, 1.1, 1.15, 1.25]) == pytest.approx([0, 0, 0.1, 0.1, 0.2])


def test_the_level_follows_the_loss_down():
    assert thresholds([5.0, 2.0, 1.0, 1.05, 1.2, 1.2, 1.3]) == pytest.approx([0, 0, 0, 0, 0.1, 0.1, 0.2])


def test_by_taids_library_the_level_stays_where_training_began_until_it_is_reached_again():
    """Its sampler.update with loss_eps 0: 1.2 and 1.9 are below the first loss, 2.0 is not, nor is 2.0 again."""
    state, seen = AdaptiveSchedule(0.0, increment=0.1, min_rise=0.0, level_follows_down=False), []
    for loss in [2.0, 1.0, 1.2, 1.9, 2.0, 2.0, 1.0, 2.1]:
        state = state.observe(loss)
        seen.append(state.threshold)
    assert seen == pytest.approx([0, 0, 0, 0, 0.1, 0.2, 0.2, 0.3])


def test_the_threshold_stops_at_one():
    assert thresholds([float(i) for i in range(15)])[-4:] == [1.0] * 4


@pytest.mark.parametrize(
    ("draw", "step", "buffer_full", "source"),
    [
        (0.0, 10, False, "fresh"),  # 0.5 (1 - 10/100) = 0.45
        (0.44, 10, True, "fresh"),
        (0.46, 10, True, "replay"),
        (0.46, 10, False, "fresh"),  # a buffer that is not full yet is filled
        (0.5, 10, True, "teacher"),
        (0.5, 10, False, "teacher"),
        (0.01, 100, True, "replay"),  # the last step generates nothing
        (0.24, 50, True, "fresh"),
        (0.26, 50, True, "replay"),
    ],
)
def test_what_a_step_trains_on(draw, step, buffer_full, source):
    assert schedule(0.5).source(draw, step=step, num_steps=100, buffer_full=buffer_full) == source


def test_without_a_threshold_every_step_is_the_teachers():
    assert schedule().source(0.0, step=1, num_steps=10, buffer_full=False) == "teacher"


def example(number):
    return TrainingExample([number], [1], [1], "real")


def test_the_buffer_keeps_the_newest_and_samples_without_repetition():
    buffer = ReplayBuffer(4)
    buffer.add(example(i) for i in range(3))
    assert not buffer.full
    assert len(buffer.sample(8, random.Random(0))) == 3
    buffer.add(example(i) for i in range(3, 6))
    assert buffer.full
    assert sorted(e.prompt_ids[0] for e in buffer.sample(4, random.Random(0))) == [2, 3, 4, 5]


def test_the_buffer_survives_a_checkpoint():
    buffer, restored = ReplayBuffer(3), ReplayBuffer(3)
    buffer.add(example(i) for i in range(5))
    restored.add([example(9)])
    restored.load_state(buffer.state())
    assert restored.state() == buffer.state()
    assert restored.sample(3, random.Random(1)) == buffer.sample(3, random.Random(1))
