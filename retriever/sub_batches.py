"""Which texts share a forward pass, and how wide it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Texts and tokens of one forward pass. A CPU is bound by arithmetic, and beyond about 2k tokens the activations only
# leave the cache; a GPU wants enough work per launch.
SUB_BATCH = {"cpu": (64, 2048), "cuda": (512, 65_536)}
MAX_SHARED_WIDTH, WIDTH_STEP = 32, 8


def sub_batches(lengths: np.ndarray, device: str, *, one_width: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers of each sub-batch, longest first, and its width in tokens.

    On a CPU a text's width follows from its own length, so that an answer does not depend on who else asks: `one_width`
    is for models that pad all texts of a sub-batch alike. On a GPU the longest decides, because many small launches
    cost more than padding.
    """
    max_texts, max_tokens = SUB_BATCH["cpu" if device == "cpu" else "cuda"]
    widths = np.array([cpu_width(length) for length in lengths.tolist()]) if device == "cpu" else lengths
    order = np.argsort(-widths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(widths[order[start]])
        end = start + max(1, min(max_texts, max_tokens // max(1, longest)))
        if one_width:
            end = min(end, start + int(np.sum(widths[order[start:end]] == longest)))
        yield order[start:end], longest
        start = end


def cpu_width(length: int) -> int:
    """Tokens to which a text is padded on a CPU: short ones share few widths, as every width has its price."""
    return length if length > MAX_SHARED_WIDTH else -(-length // WIDTH_STEP) * WIDTH_STEP
