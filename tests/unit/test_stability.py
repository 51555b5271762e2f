"""The collapse detector: silent on healthy runs, and the right alarm on each kind of collapse."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from dgpo.config.schema import StabilityConfig
from dgpo.runs.stability import ADVICE, CollapseDetector, choose_response

RECORDED = Path(__file__).parent / "recorded"
HEALTHY = {
    "actor/entropy": 0.6,
    "actor/grad_norm": 1.2,
    "actor/kl_to_init": 0.1,
    "critic/grad_norm": 0.6,
    "teacher/kl_failed": 0.9,
    "teacher/kl_all": 0.8,
    "episode/em": 0.3,
    "episode/answered": 0.95,
    "episode/repeated_token_share": 0.1,
    "episode/truncated_turn_share": 0.02,
    "episode/response_fill": 0.3,
}


def detector(**thresholds):
    return CollapseDetector(StabilityConfig(**thresholds), num_questions=512)


def replay(*phases, detector=None):
    """Alarms of a run that is healthy but for what the phases say: (number of steps, changed metrics)."""
    detector = detector or CollapseDetector(StabilityConfig(), num_questions=512)
    alarms, step = [], 0
    for count, changed in phases:
        for _ in range(count):
            step += 1
            alarms += detector.observe({"step": step, **HEALTHY, **changed})
    return alarms


def test_a_steady_run_raises_nothing():
    assert replay((100, {})) == []


@pytest.mark.parametrize(
    ("changed", "rule", "threshold"),
    [
        ({"actor/entropy": 0.001}, "entropy_low", 0.01),
        ({"actor/entropy": 2.5}, "entropy_high", 1.8),  # 3 times the early 0.6
        ({"episode/repeated_token_share": 0.8}, "repetition", 0.5),
        ({"episode/truncated_turn_share": 0.9}, "turn_length", 0.5),
        ({"episode/response_fill": 0.97}, "response_length", 0.9),
        ({"actor/kl_to_init": 2.5}, "kl", 2.0),
        ({"teacher/kl_failed": 4.0}, "kl", 3.6),  # 4 times the early 0.9
        ({"actor/grad_norm": 13.0}, "gradient", 12.0),  # 10 times the median of 1.2
        ({"critic/grad_norm": 6.5}, "gradient", 6.0),
    ],
)
def test_each_collapse_raises_its_own_alarm_once_it_has_lasted(changed, rule, threshold):
    (alarm,) = replay((20, {}), (10, changed))
    assert (alarm.rule, alarm.metric) == (rule, next(iter(changed)))
    assert alarm.value == changed[alarm.metric]
    assert alarm.threshold == pytest.approx(threshold)
    assert (alarm.first_step, alarm.step) == (21, 23)  # patience is 3


@pytest.mark.parametrize("changed", [{"actor/entropy": 0.001}, {"actor/grad_norm": 50.0}, {"teacher/kl_all": 9.0}])
def test_two_bad_steps_are_no_collapse(changed):
    assert replay((20, {}), (2, changed), (5, {}), (2, changed), (5, {})) == []


def test_a_fall_of_exact_match_is_seen_in_its_moving_average():
    # Means of 5: .30, then .24 .18 .12 .06 0: below half of .30 from the third bad step on, three times at the fifth.
    (alarm,) = replay((20, {}), (10, {"episode/em": 0.0}))
    assert (alarm.rule, alarm.metric, alarm.step) == ("em_fall", "episode/em", 25)
    assert alarm.first_step == 23 - 4  # what the first broken mean reaches back to
    assert alarm.threshold == pytest.approx(0.15)


def test_a_fall_of_the_answer_rate_is_an_alarm_of_its_own():
    (alarm,) = replay((20, {}), (10, {"episode/answered": 0.4}))
    assert alarm.rule == "answer_fall"


def test_a_fall_within_the_noise_of_few_questions_is_none():
    """0.1 -> 0.04 of 5 x 8 questions is 4 right answers against 1 or 2."""
    few = CollapseDetector(StabilityConfig(), num_questions=8)
    assert replay((20, {"episode/em": 0.1}), (20, {"episode/em": 0.04}), detector=few) == []
    many = CollapseDetector(StabilityConfig(), num_questions=512)
    assert [alarm.rule for alarm in replay((20, {"episode/em": 0.1}), (20, {"episode/em": 0.04}), detector=many)] == [
        "em_fall"
    ]


@pytest.mark.parametrize(("num_questions", "rate"), [(16, 0.3), (64, 0.05), (64, 0.1), (512, 0.1)])
def test_a_steady_rate_raises_nothing_in_a_thousand_noisy_steps(num_questions, rate):
    for seed in range(3):
        random = np.random.default_rng(seed)
        watch = CollapseDetector(StabilityConfig(), num_questions=num_questions)
        rates = random.binomial(num_questions, rate, size=1000) / num_questions
        assert [
            alarm for step, em in enumerate(rates, 1) for alarm in watch.observe({"step": step, "episode/em": em})
        ] == []


def test_a_metric_that_is_not_finite_alarms_at_once():
    (alarm,) = replay((10, {}), (3, {"actor/grad_norm": math.nan}))
    assert (alarm.rule, alarm.metric, alarm.step, alarm.first_step) == ("non_finite", "actor/grad_norm", 11, 11)


def test_one_step_without_a_number_does_not_blind_the_rules_that_follow():
    alarms = replay((2, {}), (1, {"actor/entropy": math.nan}), (10, {}), (5, {"actor/entropy": 2.5}))
    assert [alarm.rule for alarm in alarms] == ["non_finite", "entropy_high"]


def test_a_correlation_may_be_undefined():
    assert replay((10, {"training/rollout_actor_probs_pearson_corr": math.nan})) == []


def test_a_rule_that_stays_broken_alarms_once_and_again_after_it_was_met():
    broken = {"actor/entropy": 0.001}
    assert [alarm.step for alarm in replay((10, {}), (10, broken), (5, {}), (10, broken))] == [13, 28]


def test_a_run_that_starts_far_from_its_teacher_is_no_collapse():
    assert replay((50, {"teacher/kl_failed": 5.0, "teacher/kl_all": 4.0})) == []


def test_missing_metrics_are_skipped():
    watch = detector()
    assert [watch.observe({"step": step, "episode/em": 0.2}) for step in range(1, 30)] == [[]] * 29


def test_a_resumed_run_knows_what_the_killed_one_saw():
    records = [{"step": step, **HEALTHY} for step in range(1, 21)]
    records += [{"step": step, **HEALTHY, "actor/entropy": 2.5} for step in range(21, 31)]
    straight = [alarm for watch in [detector()] for record in records for alarm in watch.observe(record)]
    resumed = detector()
    resumed.restore(records[:21])
    assert [alarm for record in records[21:] for alarm in resumed.observe(record)] == straight != []
    late = detector()
    late.restore(records[:25])
    assert [alarm for record in records[25:] for alarm in late.observe(record)] == []


def test_thresholds_are_settings():
    assert replay((20, {}), detector=detector(min_entropy=0.7))[0].rule == "entropy_low"
    assert replay((20, {}), (1, {"actor/entropy": 0.0}), detector=detector(patience=1))[0].step == 21


def test_an_alarm_says_what_where_and_what_to_do():
    (alarm,) = replay((20, {}), (3, {"actor/entropy": 2.5}))
    assert str(alarm) == (
        "entropy_high: actor/entropy=2.5 at step 23, limit 1.8 (first sign at step 21): the policy writes "
        "almost at random; lower train.actor_learning_rate or train.entropy_coef"
    )
    assert all(advice for advice in ADVICE.values())


@pytest.mark.parametrize(
    ("action", "rollbacks_left", "first_of_run", "response"),
    [
        ("warn", 2, True, "save"),
        ("warn", 2, False, "go_on"),
        ("stop", 2, True, "stop"),
        ("stop", 2, False, "stop"),
        ("rollback", 1, True, "roll_back"),
        ("rollback", 1, False, "roll_back"),
        ("rollback", 0, False, "stop"),
        ("rollback", -1, False, "stop"),  # max_rollbacks was lowered between two resumes
    ],
)
def test_what_an_alarm_leads_to(action, rollbacks_left, first_of_run, response):
    assert choose_response(action, rollbacks_left=rollbacks_left, first_of_run=first_of_run) == response


def recorded(name):
    return [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["tiny_quickstart", "tiny_dgpo"])
def test_recorded_healthy_runs_raise_nothing(name):
    """Real runs of the tiny world with its own settings."""
    watch = CollapseDetector(StabilityConfig(), num_questions=64)
    assert [alarm for record in recorded(name) for alarm in watch.observe(record)] == []


def test_a_recorded_collapse_is_seen():
    """A real run of the tiny world with an actor learning rate of 0.1: it runs away from its second step on."""
    watch = CollapseDetector(StabilityConfig(), num_questions=16)
    (alarm,) = [alarm for record in recorded("tiny_collapse") for alarm in watch.observe(record)]
    assert (alarm.rule, alarm.metric, alarm.first_step, alarm.step) == ("kl", "actor/kl_to_init", 2, 4)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("tiny_collapse_apart", {"entropy_high", "answer_fall", "turn_length"}),
        ("tiny_collapse_loops", {"entropy_low", "answer_fall", "turn_length", "repetition"}),
    ],
)
def test_recorded_collapses_raise_the_alarms_of_their_kind(name, rules):
    """The two attempts of a real run with an actor learning rate of 0.3, rolled back once; its own settings."""
    watch = CollapseDetector(StabilityConfig(patience=2, window=2), num_questions=16)
    assert {alarm.rule for record in recorded(name) for alarm in watch.observe(record)} == rules


def test_the_page_has_every_rule_and_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "stability.md").read_text()
    assert [rule for rule in ADVICE if f"| `{rule}` |" not in page] == []
    defaults = {name: value for name, value in vars(StabilityConfig()).items() if name[:4] in ("min_", "max_")}
    shown = {name: float(value) for name, value in re.findall(r"`(\w+)=([\d.]+)`", page)}
    assert {name: shown.get(name) for name in defaults if name != "max_rollbacks"} == {
        name: value for name, value in defaults.items() if name != "max_rollbacks"
    }
    assert (shown["patience"], shown["window"]) == (StabilityConfig().patience, StabilityConfig().window)
