"""The protocol of the authors' release, faults included, so that numbers can be compared with the paper's.

What differs from ours: single samples at temperature 1; the last batch of all sets in a row is dropped when it is not
full; the answer is the last `<answer>` in prompt *and* response, so that an episode without one answers the prompt's
example; a hit is a case-sensitive substring; searches are `<search>` tags, the prompt's one less. Read from
omron-sinicx/dgpo@97b7816, verl/utils/reward_score/qa_em.py and verl/trainer/main_ppo.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

LABEL = "upstream-compatible"
TEMPERATURE = 1.0

Item = TypeVar("Item")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """The last `<answer>` in the whole episode as text, stripped; None without any.

    Args:
        text: prompt, turns and observations. Search-R1's prompt holds `<answer> Beijing </answer>`, and the text on
            invalid actions `<answer> and </answer>`: both count.
    """
    matches = _ANSWER.findall(text)
    return matches[-1].strip() if matches else None


def count_searches(text: str) -> int:
    """`<search>` tags of the whole episode as text but one, the prompt's: `val/search_count` of the release.

    Also counts a search that was never executed, and each tag in the text on invalid actions.
    """
    return text.count("<search>") - 1


def drop_incomplete_batch(sets: Mapping[str, Sequence[Item]], batch_size: int) -> dict[str, list[Item]]:
    """The sets one after another, cut to a multiple of `batch_size`: 51,713 questions in batches of 256 lose one.

    A set that loses all of its questions is left out.
    """
    left = sum(map(len, sets.values())) // batch_size * batch_size
    kept: dict[str, list[Item]] = {}
    for name, items in sets.items():
        if left:
            kept[name] = list(items[:left])
            left -= len(kept[name])
    return kept
