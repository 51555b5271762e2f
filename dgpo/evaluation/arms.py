"""Rows of `reproduce` that are a preset with overrides of their own, and settings that are tried for them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Arm:
    """A row that is a preset with overrides of its own.

    Attributes:
        preset: an experiment, or `teacher`: that model as it is.
        overrides: `{teacher}` stands for the path of the good teacher.
        teacher: the row that tests the arm's teacher; None where no row does.
        form: of the teacher term.
    """

    label: str
    preset: str
    overrides: tuple[str, ...] = ()
    teacher: str | None = None
    form: str = "exact"

    def own(self, teacher: str | None) -> list[str]:
        """The overrides, with the good teacher's path."""
        return [each.format(teacher=teacher) for each in self.overrides]


@dataclass(frozen=True)
class Grid:
    """Values of a setting, each tried on tuning seeds for every one of some arms, as rows `<arm>_<value>`.

    Attributes:
        arms: name -> the arm without a value of the setting.
        values: name, for rows -> how a table calls it.
        override: of an arm's name and a value's: what sets it.
    """

    arms: Mapping[str, Arm]
    values: Mapping[str, str]
    override: Callable[[str, str], str]

    def tried(self) -> dict[str, Arm]:
        """Row -> arm."""
        return {
            f"{name}_{value}": Arm(f"{arm.label}, {value}", arm.preset, (*arm.overrides, self.override(name, value)))
            for name, arm in self.arms.items()
            for value in self.values
        }

    def best(self, scores: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
        """Arm -> the value with the highest mean over the tuning seeds; of equal ones the first.

        Args:
            scores: row -> seed -> exact match on validation questions at the last step.
        """

        def mean(name: str, value: str) -> float:
            return statistics.mean(scores[f"{name}_{value}"].values())

        return {name: max(self.values, key=partial(mean, name)) for name in self.arms}
