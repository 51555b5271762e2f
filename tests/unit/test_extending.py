"""The example of docs/extending.md: an algorithm, a gate and a teacher form, each by one entry of a table."""

import re
from pathlib import Path

import pytest
import torch

from dgpo.algorithms.advantages import ALGORITHMS
from dgpo.algorithms.selective_kl import GATES, TEACHER_FORMS, compute_gate
from dgpo.checks.values import check_values
from dgpo.config.load import load_config
from dgpo.config.methods import rl_conflict, support_table, teacher_coef
from dgpo.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def example(monkeypatch):
    """The page's entries, for one test."""
    for table in (ALGORITHMS, GATES, TEACHER_FORMS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    for table, name in ((ALGORITHMS, "rloo"), (GATES, "searched"), (TEACHER_FORMS, "bounded")):
        monkeypatch.setitem(table, name, None)  # taken out again after the test
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "rloo" in block]
    exec(source, {})


def settings(**values):
    overrides = {"train.algorithm": "rloo", "train.teacher_term.gate": "searched", "train.teacher_term.form": "bounded"}
    overrides |= {"train.samples_per_question": 2, **values}
    return load_config([f"{key}={value}" for key, value in overrides.items()])


def test_the_settings_take_the_new_names(example):
    config = settings()
    check_values(config, "train")
    assert rl_conflict(config) is None
    assert teacher_coef(config.train.teacher_term) == 0.001
    assert ("rloo", "bounded", "searched", None) in support_table()


def test_rules_ask_the_entry_and_not_the_name(example):
    assert "train.algorithm=rloo compares the episodes of one question" in rl_conflict(
        settings(**{"train.samples_per_question": 1})
    )
    assert "train.teacher_term.form=bounded acts through the advantage estimator" in rl_conflict(
        settings(**{"train.algorithm": "gkd", "train.teacher_term.gate": "all"})
    )


def test_without_the_entries_the_names_are_refused():
    with pytest.raises(ConfigError, match="rloo: expected one of ppo, grpo, gkd"):
        check_values(settings(), "train")


def test_a_step_of_the_new_method_by_hand(example):
    correct = torch.tensor([1.0, 0.0, 0.0, 0.0])
    scores = {"em": correct, "num_searches": torch.tensor([1.0, 2.0, 0.0, 1.0])}
    gate = compute_gate(correct, "searched", scores=scores)
    assert gate.tolist() == [0, 1, 0, 1]
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
    rewards = TEACHER_FORMS["bounded"].in_rewards(
        torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        student_log_probs=torch.zeros(4, 2),
        teacher_log_probs=torch.tensor([[-9.0, -9.0], [-9.0, -1.0], [-9.0, -9.0], [-2.0, -9.0]]),
        response_mask=mask,
        gate=gate,
        kl_coef=0.1,
    )
    # Gated and generated: 9 nats count as 5, 1 and 2 as they are.
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 1.0], [-0.5, -0.1], [0.0, 0.0], [-0.2, 0.0]]))
    advantages, returns = ALGORITHMS["rloo"].estimate(
        rewards, response_mask=mask, values=None, groups=["a", "a", "b", "b"], gamma=1.0, lam=1.0
    )
    torch.testing.assert_close(advantages, torch.tensor([[1.6, 1.6], [-1.6, -1.6], [0.2, 0.2], [-0.2, 0.0]]))
    assert returns is advantages
