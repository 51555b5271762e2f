"""A part of the step is timed, filed as a span and bounded; no Ray, no engine."""

import time

import pytest

from dgpo.rl.loop import DGPOTrainer
from dgpo.runs.watchdog import Watchdog

pytestmark = pytest.mark.engine


@pytest.fixture
def trainer():
    """Without what veRL sets up."""
    trainer = DGPOTrainer.__new__(DGPOTrainer)
    trainer.watchdog = Watchdog({"start": 60.0, "update": 60.0, "sync": 60.0})
    trainer.watchdog.enter("update")
    trainer.seconds, trainer.spans = {}, []
    return trainer


def test_a_phase_is_timed_filed_and_bounded_while_it_lasts(trainer):
    with trainer.phase("step"):
        with trainer.phase("update_weights", limit="sync"):
            assert trainer.watchdog.phase == "sync"
            time.sleep(0.05)
        assert trainer.watchdog.phase == "update"
    assert trainer.seconds.keys() == {"update_weights", "step"}
    assert 0.05 <= trainer.seconds["update_weights"] <= trainer.seconds["step"]
    (inner, outer) = trainer.spans
    assert [inner[0], outer[0]] == ["update_weights", "step"]
    assert outer[1] <= inner[1] < inner[2] <= outer[2]
    assert inner[2] - inner[1] == pytest.approx(trainer.seconds["update_weights"], abs=0.02)


def test_a_phase_that_comes_again_adds_to_its_time_and_has_a_span_of_its_own(trainer):
    for _ in range(2):
        with trainer.phase("old_log_prob"):
            time.sleep(0.02)
    assert trainer.seconds["old_log_prob"] >= 0.04
    assert len(trainer.spans) == 2


def test_an_error_leaves_the_watchdog_in_the_phase_that_it_came_from(trainer):
    """What ended it is then told of the right phase."""
    with pytest.raises(ValueError, match="a mistake"), trainer.phase("update_weights", limit="sync"):
        raise ValueError("a mistake")
    assert trainer.watchdog.phase == "sync"
