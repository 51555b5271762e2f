import numpy as np
import pytest

from dgpo.metrics import intervals
from dgpo.metrics.intervals import bootstrap_ci, paired_bootstrap


def test_the_interval_of_a_share_is_near_the_normal_approximation():
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_ci(values)
    half_width = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half_width, abs=0.004)
    assert high == pytest.approx(0.3 + half_width, abs=0.004)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_ci([0.5] * 10) == (0.5, 0.5)


def test_intervals_repeat_for_a_seed_and_grow_with_confidence():
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3)
    narrow, wide = bootstrap_ci(values, confidence=0.5), bootstrap_ci(values, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_many_questions_are_resampled_in_parts(monkeypatch):
    values = np.random.default_rng(0).random(40).tolist()
    whole = bootstrap_ci(values, num_samples=999)
    monkeypatch.setattr(intervals, "_MAX_INDICES", 40 * 100)
    assert bootstrap_ci(values, num_samples=999) == pytest.approx(whole)


def test_pairing_removes_what_questions_share():
    generator = np.random.default_rng(1)
    difficulty = generator.random(200) * 10
    a = (difficulty + 0.1 + generator.normal(0, 0.05, 200)).tolist()
    difference, low, high = paired_bootstrap(a, difficulty.tolist())
    assert difference == pytest.approx(0.1, abs=0.02)
    assert 0 < low < difference < high < 0.2


def test_a_sequence_against_itself_differs_by_nothing():
    assert paired_bootstrap([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0.0, 0.0, 0.0)


def test_unusable_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_ci([])
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_ci([1.0], confidence=95)
    with pytest.raises(ValueError, match="2 values against 1"):
        paired_bootstrap([1.0, 0.0], [1.0])
