"""Which settings of the method go together. One source for the checks and for the tables of `docs/methods.md`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dgpo.config.schema import Config

ALGORITHMS = ("ppo", "grpo", "gkd")
INIT_KL_FORMS = ("reward", "loss")
TEACHER_FORMS = ("reward", "token", "exact")
GATES = ("failed", "all", "none")


@dataclass(frozen=True)
class Rule:
    """A combination that makes no sense: when it holds, why, and the way out (`{c...}` is the value seen)."""

    holds: Callable[[Config], bool]
    reason: str


RL_RULES = (
    Rule(
        lambda c: c.train.algorithm == "gkd" and c.train.teacher_term.gate == "none",
        "train.algorithm=gkd has no task reward, and train.teacher_term.gate=none no teacher: nothing is left to learn "
        "from; set train.teacher_term.gate=all",
    ),
    Rule(
        lambda c: c.train.algorithm == "gkd" and c.train.teacher_term.form == "reward",
        "train.teacher_term.form=reward acts through the advantage estimator, and train.algorithm=gkd has none; choose "
        "exact or token",
    ),
    Rule(
        lambda c: c.train.algorithm == "gkd" and c.train.init_kl_coef > 0 and c.train.init_kl_form == "reward",
        "train.init_kl_coef is subtracted from the reward, and train.algorithm=gkd has none; set it to 0, or "
        "train.init_kl_form=loss",
    ),
    Rule(
        lambda c: c.train.algorithm == "grpo" and c.train.samples_per_question < 2,
        "train.algorithm=grpo compares the episodes of one question, and train.samples_per_question="
        "{c.train.samples_per_question} leaves nothing to compare; set it to 5, say",
    ),
    Rule(
        lambda c: (
            c.train.teacher_term.form == "exact" and c.train.teacher_term.gate != "none" and c.train.temperature != 1
        ),
        "train.temperature={c.train.temperature} with train.teacher_term.form=exact: veRL scales the student's logits "
        "by it, and the KL would compare a sharpened student with a plain teacher; set it to 1.0",
    ),
)


def rl_conflict(config: Config) -> str | None:
    """Why the settings of the RL stage contradict each other, or None."""
    return next((rule.reason.format(c=config) for rule in RL_RULES if rule.holds(config)), None)


def support_table() -> list[tuple[str, str, str, str | None]]:
    """(algorithm, form, gate, reason against it or None) for every combination, other settings being sensible."""
    rows = []
    for algorithm in ALGORITHMS:
        for form in TEACHER_FORMS:
            for gate in GATES:
                config = Config()
                config.train.algorithm = algorithm
                config.train.samples_per_question = 5 if algorithm == "grpo" else 1
                config.train.teacher_term.form, config.train.teacher_term.gate = form, gate
                rows.append((algorithm, form, gate, rl_conflict(config)))
    return rows
