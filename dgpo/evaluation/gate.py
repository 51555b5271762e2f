"""The experiment of docs/results/gate.md, "when does the gate matter?": its arms, which are rows of `reproduce`."""

from __future__ import annotations

from dgpo.algorithms.selective_kl import TEACHER_FORMS
from dgpo.evaluation.arms import Arm, Grid

TABLES = ("gate", "gate_tuning")
# Of both tables, below what the user gives. Twelve epochs took the cold start of seed 991 to .555 at temperature 1.
DEFAULTS = ("train.num_steps=60", "distill.epochs=12")
TEST_SEEDS = (41, 42, 43, 44, 45)
RELATION = "code"  # of which the biased teacher answers 80% wrongly
MIN_START_EM = 0.5  # exact match of the cold start, sampled at temperature 1
FACTORS = {"third": 1 / 3, "one": 1.0, "three": 3.0}  # of the form's default coefficient

_PATHS = {"good": (), "biased": ("teacher.path={teacher}_biased",)}


def _guided(teacher: str, gate: str, form: str = "exact") -> Arm:
    label = f"{teacher} teacher, {gate}" + (f", {form}" if form != "exact" else "")
    term = (f"train.teacher_term.gate={gate}", f"train.teacher_term.form={form}")
    return Arm(label, "dgpo", (*_PATHS[teacher], *term), f"{teacher}_teacher", form)


TUNED = {f"{teacher}_{gate}": _guided(teacher, gate) for teacher in _PATHS for gate in ("failed", "all", "random")}
TUNED["biased_failed_reward"] = _guided("biased", "failed", "reward")


def coefficient(arm: str, factor: str) -> str:
    """The override that gives an arm of `TUNED` one of the coefficients that are tried."""
    return f"train.teacher_term.coef={FACTORS[factor] * TEACHER_FORMS[TUNED[arm].form].default_coef:.4g}"


UNTUNED = {
    "good_teacher": Arm("good teacher", "teacher"),
    "biased_teacher": Arm("biased teacher", "teacher", _PATHS["biased"]),
    "none": Arm("none", "no_teacher"),
}
GRID = Grid(TUNED, {"third": "1/3 of the default", "one": "default", "three": "3 times"}, coefficient)
TRIED = GRID.tried()
ARMS = {**UNTUNED, **TUNED, **TRIED}
ROWS = {"gate": ("kd", *UNTUNED, *TUNED), "gate_tuning": ("kd", *TRIED)}
# On the biased relation, paired by seed.
CONTRASTS = (("biased_failed", "biased_all"), ("biased_failed", "biased_random"))
