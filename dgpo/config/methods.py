"""Which settings of the method go together. One source for the checks and for the tables of `docs/methods.md`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dgpo.algorithms.advantages import ALGORITHMS, Algorithm
from dgpo.algorithms.distillation import DISTILLATION_LOSSES
from dgpo.algorithms.selective_kl import GATES, TEACHER_FORMS, TeacherForm, unchanged
from dgpo.config.schema import Config, TeacherTermConfig

INIT_KL_FORMS = ("reward", "loss")


def algorithm_of(config: Config) -> Algorithm:
    return ALGORITHMS[config.train.algorithm]


def teacher_form(config: Config) -> TeacherForm | None:
    """None without a teacher."""
    return TEACHER_FORMS[config.train.teacher_term.form] if has_teacher(config, "train") else None


def has_teacher(config: Config, stage: str) -> bool:
    """Whether the teacher is loaded in a stage that trains."""
    if stage == "train":
        return config.train.teacher_term.gate != "none"
    return stage == "distill" and DISTILLATION_LOSSES[config.distill.loss].needs_teacher


def has_exact_teacher(config: Config) -> bool:
    """Whether the actor's loss reads the teacher's full distribution."""
    form = teacher_form(config)
    return form is not None and form.in_loss


def teacher_coef(term: TeacherTermConfig) -> float:
    """The weight of the teacher term: as set, or the default of its form."""
    return term.coef if term.coef is not None else TEACHER_FORMS[term.form].default_coef


@dataclass(frozen=True)
class Rule:
    """A combination that makes no sense: when it holds, why, and the way out (`{c...}` is the value seen)."""

    holds: Callable[[Config], bool]
    reason: str


RL_RULES = (
    Rule(
        lambda c: not algorithm_of(c).task_reward and c.train.teacher_term.gate == "none",
        "train.algorithm={c.train.algorithm} has no task reward, and train.teacher_term.gate=none no teacher: nothing "
        "is left to learn from; set train.teacher_term.gate=all",
    ),
    Rule(
        lambda c: (
            not algorithm_of(c).task_reward and TEACHER_FORMS[c.train.teacher_term.form].in_rewards is not unchanged
        ),
        "train.teacher_term.form={c.train.teacher_term.form} acts through the advantage estimator, and "
        "train.algorithm={c.train.algorithm} has none; choose exact or token",
    ),
    Rule(
        lambda c: not algorithm_of(c).task_reward and c.train.init_kl_coef > 0 and c.train.init_kl_form == "reward",
        "train.init_kl_coef is subtracted from the reward, and train.algorithm={c.train.algorithm} has none; set it "
        "to 0, or train.init_kl_form=loss",
    ),
    Rule(
        lambda c: algorithm_of(c).compares_groups and c.train.samples_per_question < 2,
        "train.algorithm={c.train.algorithm} compares the episodes of one question, and train.samples_per_question="
        "{c.train.samples_per_question} leaves nothing to compare; set it to 5, say",
    ),
    Rule(
        lambda c: has_exact_teacher(c) and c.train.temperature != 1,
        "train.temperature={c.train.temperature} with train.teacher_term.form={c.train.teacher_term.form}: veRL scales "
        "the student's logits by it, and the KL would compare a sharpened student with a plain teacher; set it to 1.0",
    ),
)


def rl_conflict(config: Config) -> str | None:
    """Why the settings of the RL stage contradict each other, or None."""
    return next((rule.reason.format(c=config) for rule in RL_RULES if rule.holds(config)), None)


def support_table() -> list[tuple[str, str, str, str | None]]:
    """(algorithm, form, gate, reason against it or None) for every combination, other settings being sensible."""
    rows = []
    for algorithm, entry in ALGORITHMS.items():
        for form in TEACHER_FORMS:
            for gate in GATES:
                config = Config()
                config.train.algorithm = algorithm
                config.train.samples_per_question = 5 if entry.compares_groups else 1
                config.train.teacher_term.form, config.train.teacher_term.gate = form, gate
                rows.append((algorithm, form, gate, rl_conflict(config)))
    return rows
