import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo.algorithms.taid import TaidSchedule, TaidState, initial_state, update_state

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "divergences.json").read_text())["taid_schedule"]
# So many steps that the straight line hardly moves.
SLOW = TaidSchedule(t_start=0.4, t_end=1.0, alpha=0.1, momentum=0.5, num_steps=10**9)


def test_t_follows_sakanas_release():
    schedule = TaidSchedule(
        t_start=GOLDEN["t_start"],
        t_end=GOLDEN["t_end"],
        alpha=GOLDEN["alpha"],
        momentum=GOLDEN["beta"],
        num_steps=GOLDEN["num_steps"],
    )
    state = initial_state(schedule)
    for step, (loss, expected) in enumerate(zip(GOLDEN["losses"], GOLDEN["t_after_step"], strict=True)):
        state = update_state(state, loss, step=step, schedule=schedule)
        assert state.t == pytest.approx(expected, abs=1e-12)


def test_an_adaptive_step_by_hand():
    state = update_state(TaidState(t=0.4, previous_loss=2.0, mean_change=0.1), 1.0, step=1, schedule=SLOW)
    mean_change = 0.5 * 0.1 + 0.5 * (2.0 - 1.0) / 2.0
    assert state.mean_change == pytest.approx(mean_change)
    assert state.t == pytest.approx(0.4 + 0.1 / (1 + math.exp(-mean_change)) * 0.6)
    assert state.previous_loss == 1.0


def test_the_first_loss_only_sets_what_the_next_is_compared_with():
    state = update_state(initial_state(SLOW), 3.0, step=0, schedule=SLOW)
    assert state == TaidState(t=0.4, previous_loss=3.0, mean_change=0.0)


def test_t_rises_faster_while_the_loss_falls():
    before = TaidState(t=0.4, previous_loss=2.0)
    falling, rising = (update_state(before, loss, step=1, schedule=SLOW).t for loss in (1.0, 3.0))
    assert falling > rising > 0.4


def test_t_keeps_up_with_the_line_and_stops_at_its_end():
    schedule = replace(SLOW, alpha=0.0, num_steps=10)
    states = [update_state(TaidState(t=0.4, previous_loss=1.0), 1.0, step=s, schedule=schedule) for s in (5, 10, 12)]
    assert [state.t for state in states] == pytest.approx([0.7, 1.0, 1.0])


def test_a_loss_that_explodes_does_not_overflow():
    state = update_state(TaidState(t=0.5, previous_loss=1e-9), 1e9, step=1, schedule=SLOW)
    assert state.t == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_start": 1.2}, "from 1.2 to 1.0"),
        ({"t_start": 0.6, "t_end": 0.5}, "from 0.6 to 0.5"),
        ({"num_steps": 0}, "has 0 steps"),
    ],
)
def test_impossible_schedules_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SLOW, **change)
