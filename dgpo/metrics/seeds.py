"""Contrasts over repetitions of a whole experiment: one difference per seed, which is the unit of every test here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contrast:
    """A mean of paired differences, one per seed.

    Attributes:
        interval: the 95% interval of Student's t.
        p: two-sided, of a mean of zero (paired t-test).
        differences: by seed.
    """

    mean: float
    interval: tuple[float, float]
    p: float
    differences: tuple[float, ...]


def contrast(differences: Sequence[float], *, confidence: float = 0.95) -> Contrast:
    """The paired t-test of differences between two arms, one per seed.

    Raises:
        ValueError: fewer than two seeds have no spread.
    """
    from scipy.stats import t

    mean, error, freedom = _moments(differences)
    half = float(t.ppf((1 + confidence) / 2, freedom)) * error
    p = 2 * float(t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Contrast(mean, (mean - half, mean + half), p, tuple(map(float, differences)))


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """The p value of "the mean lies within +-margin": the larger of two one-sided t-tests (TOST, Schuirmann 1987).

    Raises:
        ValueError: fewer than two seeds, or a margin that is not positive.
    """
    from scipy.stats import t

    if margin <= 0:
        raise ValueError(f"margin is {margin}: expected more than 0")
    mean, error, freedom = _moments(differences)
    if not error:
        return float(abs(mean) >= margin)
    return float(max(t.sf((mean + margin) / error, freedom), t.sf((margin - mean) / error, freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def _moments(differences: Sequence[float]) -> tuple[float, float, int]:
    """(mean, its standard error, degrees of freedom)."""
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} differences: a spread needs two seeds at least")
    data = np.asarray(differences, dtype=np.float64)
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(len(data))), len(data) - 1
