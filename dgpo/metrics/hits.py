"""Whether a retrieved passage holds a gold answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.metrics.exact_match import normalize_answer


def answer_in_passages(golds: Sequence[str], documents: Sequence[Mapping[str, Any]], *, raw: bool = False) -> bool:
    """Whether any gold answer stands in any passage, on word boundaries of the normalised texts.

    An answer that normalises to nothing is in no passage.

    Args:
        golds: the accepted answers.
        documents: `{"id", "contents"}`; title and text are both searched.
        raw: the authors' release instead: a case-sensitive substring, inside words too.
    """
    texts = [str(document["contents"]) for document in documents]
    if raw:
        return any(gold in text for gold in golds for text in texts)
    padded = [f" {normalize_answer(text)} " for text in texts]
    answers = [normalize_answer(gold) for gold in golds]
    return any(f" {answer} " in text for answer in answers if answer for text in padded)
