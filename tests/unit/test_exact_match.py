import json
from pathlib import Path

import pytest

from dgpo.metrics.exact_match import exact_match, f1_score, normalize_answer, sub_exact_match

CASES = json.loads((Path(__file__).parents[1] / "golden" / "exact_match.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["prediction"])[:40])
def test_scores_equal_the_authors(case):
    prediction, golds = case["prediction"], case["gold"]
    assert normalize_answer(prediction) == case["normalized"]
    assert exact_match(prediction, golds) is bool(case["em"])
    assert sub_exact_match(prediction, golds) is bool(case["sub_em"])
    assert f1_score(prediction, golds) == pytest.approx(case["f1"])


def test_no_golds_match_nothing():
    assert not exact_match("Paris", [])
    assert f1_score("Paris", []) == 0.0


def test_f1_by_hand():
    # 2 common tokens of 3 predicted and 4 expected: 2 * (2/3) * (2/4) / (2/3 + 2/4) = 4/7.
    assert f1_score("new york city", ["york new jersey coast"]) == pytest.approx(4 / 7)


def test_yes_and_no_share_no_tokens_with_longer_answers():
    assert f1_score("yes", ["yes indeed"]) == 0.0
