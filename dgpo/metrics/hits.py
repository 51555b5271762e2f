"""Whether a retrieved passage holds a gold answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.metrics.exact_match import normalize_answer


def answer_in_passages(golds: Sequence[str], documents: Sequence[Mapping[str, Any]], *, raw: bool = False) -> bool:
    """True if any gold answer stands in any passage, on word boundaries of the normalised texts.

    Args:
        raw: the authors' release instead: case-sensitive substring.
    """
    texts = [str(document["contents"]) for document in documents]
    if raw:
        return any(gold in text for gold in golds for text in texts)
    padded = [f" {normalize_answer(text)} " for text in texts]
    answers = [normalize_answer(gold) for gold in golds]
    return any(f" {answer} " in text for answer in answers if answer for text in padded)
