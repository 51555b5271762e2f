"""Exact match, sub-string match and token F1 over normalised answers (SQuAD's normalisation)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces; in this order, as SQuAD's script does it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the normalised prediction equals any normalised gold answer. RL's reward, and the paper's metric."""
    return normalize_answer(prediction) in {normalize_answer(gold) for gold in golds}


def sub_exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether any normalised gold answer stands inside the normalised prediction, inside a word too."""
    normalized = normalize_answer(prediction)
    return any(normalize_answer(gold) in normalized for gold in golds)


def f1_score(prediction: str, golds: Sequence[str]) -> float:
    """Token F1 in [0, 1], the best over the golds; yes, no and noanswer must match whole (HotpotQA's rule)."""
    return max((_f1(normalize_answer(prediction), normalize_answer(gold)) for gold in golds), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS):
        return 0.0
    predicted, expected = prediction.split(), gold.split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)
