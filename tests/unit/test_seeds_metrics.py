"""Contrasts over seeds, against values worked by hand and against scipy's own tests."""

import pytest
from scipy import stats

from dgpo.metrics.seeds import contrast, equivalence_p, holm

DIFFERENCES = [0.08, 0.11, 0.05, 0.09, 0.02, 0.10, 0.07, 0.12]


def test_three_differences_by_hand():
    """Mean .2, deviation .1, error .1/sqrt(3) = .057735; t(.975, 2) = 4.302653."""
    found = contrast([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - 4.302653 * 0.0577350, 0.2 + 4.302653 * 0.0577350), abs=1e-6)
    assert found.p == pytest.approx(0.0741799, abs=1e-6)


def test_the_paired_t_test_is_scipys():
    found = contrast(DIFFERENCES)
    theirs = stats.ttest_1samp(DIFFERENCES, 0.0)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-12)
    assert found.differences == tuple(DIFFERENCES)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    small = [0.004, -0.006, 0.002, 0.008, -0.003]
    below = stats.ttest_1samp(small, 0.02, alternative="less").pvalue
    above = stats.ttest_1samp(small, -0.02, alternative="greater").pvalue
    assert equivalence_p(small, 0.02) == pytest.approx(max(below, above), rel=1e-12)
    assert equivalence_p(DIFFERENCES, 0.02) > 0.99


def test_holm_by_hand():
    """.01 x 3 = .03; .03 x 2 = .06; .04 x 1 = .04, but no less than the one before: .06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_arms_that_never_differ():
    assert contrast([0.0, 0.0]).p == 1.0
    assert equivalence_p([0.0, 0.0], 0.02) == 0.0


@pytest.mark.parametrize("differences", [[], [0.1]])
def test_one_seed_has_no_spread(differences):
    with pytest.raises(ValueError, match="needs two seeds at least"):
        contrast(differences)


def test_a_margin_must_leave_room():
    with pytest.raises(ValueError, match="expected more than 0"):
        equivalence_p(DIFFERENCES, 0.0)
