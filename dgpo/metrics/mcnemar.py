"""McNemar's exact test: whether two models differ on questions that both have answered."""

from __future__ import annotations


def mcnemar_exact(num_only_a: int, num_only_b: int) -> float:
    """Two-sided p-value of "either model is as likely as the other to be the one that is right".

    p = min(1, 2 * sum_{i=0..k} C(n, i) / 2^n), n the questions that exactly one model got right, k the smaller count: a
    binomial test with probability 1/2. Questions that both or neither got right say nothing about the difference.

    Args:
        num_only_a: questions that only the first model got right.
        num_only_b: only the second.

    Raises:
        ValueError: a negative count.
    """
    if num_only_a < 0 or num_only_b < 0:
        raise ValueError(f"counts of questions are {num_only_a} and {num_only_b}, expected none below 0")
    n, k = num_only_a + num_only_b, min(num_only_a, num_only_b)
    term = total = 1  # C(n, 0); whole numbers, so that nothing rounds before the division
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        total += term
    return min(1.0, 2 * total / 2**n)
