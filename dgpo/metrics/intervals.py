"""Bootstrap confidence intervals over questions: percentile intervals, seeded, so that a report repeats exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

# Resampled indices that exist at once: 10,000 resamples of 50,000 questions would take 4 GB.
_MAX_INDICES = 4_000_000


def bootstrap_ci(
    values: Sequence[float], *, confidence: float = 0.95, num_samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval (low, high) of the mean of `values`, one value per question.

    Args:
        confidence: share of resampled means between the ends.
        num_samples: resamples.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    if len(values) == 0:
        raise ValueError("no values to make an interval of: at least one question must be scored")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a share between 0 and 1, such as 0.95")
    data = np.asarray(values, dtype=np.float64)
    means = np.concatenate([data[rows].mean(axis=1) for rows in _resamples(len(data), num_samples, seed)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """mean(a) - mean(b) and its 95% interval: (difference, low, high). `a[i]` and `b[i]` score the same question.

    Questions are resampled, and both scores with them: what makes a question hard for both cancels out.

    Raises:
        ValueError: different lengths, or what `bootstrap_ci` refuses.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: a paired comparison needs both for every question")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = bootstrap_ci(differences.tolist())
    return float(differences.mean()), low, high


def _resamples(num_values: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Index arrays [some, num_values], `num_samples` rows in all."""
    generator = np.random.default_rng(seed)
    rows_at_once = max(1, _MAX_INDICES // num_values)
    for start in range(0, num_samples, rows_at_once):
        rows = min(rows_at_once, num_samples - start)
        yield generator.integers(num_values, size=(rows, num_values))
