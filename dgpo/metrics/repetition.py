"""Repetition inside one episode: the share of it that loops is the plainest sign of a policy that came apart."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4  # tokens; shorter ones recur in healthy text, and tags and names of a few tokens do anyway


def num_repeated_tokens(ids: Sequence[int], mask: Sequence[int], *, n: int = NGRAM) -> int:
    """Policy tokens that end an n-gram seen before in the same episode.

    Token t counts if tokens t-n+1 .. t all belong to one unbroken stretch of policy tokens (one turn), and the same n
    ids in a row ended at an earlier policy token of the episode, in the same stretch or another. What is copied from a
    passage counts from its second time on: the passage itself is not the policy's.

    Args:
        ids: [T] the response.
        mask: [T] 1 on policy tokens.
        n: length of the n-gram, at least 1.
    """
    seen: set[tuple[int, ...]] = set()
    stretch: list[int] = []
    repeated = 0
    for token, generated in zip(ids, mask, strict=True):
        if not generated:
            stretch.clear()
            continue
        stretch.append(token)
        if len(stretch) >= n:
            ngram = tuple(stretch[-n:])
            repeated += ngram in seen
            seen.add(ngram)
    return repeated
