"""A batch of texts through BERT and its kin on a CPU without padding: their tokens stand one after another.

Linear layers, nine tenths of the arithmetic of short texts, take every token once. Attention alone sees texts side by
side: those of one width together, padded to that width, which follows from a text's own length. So a text's vector has
the same bits in any batch, where those of a linear layer do not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from retriever.sub_batches import MAX_SHARED_WIDTH, cpu_width

NUM_TOKENS_STEP = 8  # oneDNN makes new kernels for every number of rows
# Model types whose layers leave attention to transformers' registry, and whether positions begin after the padding id
POSITIONS_AFTER_PADDING = {"bert": False, "roberta": True, "xlm-roberta": True}
ATTENTION = "retriever_unpadded"


@dataclass(frozen=True)
class Group:
    """Neighbours of one width in the joined tokens.

    Attributes:
        shape: (n, width), the number of texts and their common width.
        start, end: where the group's tokens begin and end in the joined ones.
        tokens: [n * width], the joined token that stands at each place; a place of padding holds any. None: the
            places are the joined tokens from `start` on.
        own: [end - start], the places of the texts' own tokens; None: they are the first places.
        mask: [n, 1, 1, width], true for a text's own tokens; None where no text of this width has padding.
    """

    shape: tuple[int, int]
    start: int
    end: int
    tokens: torch.Tensor | None
    own: torch.Tensor | None
    mask: torch.Tensor | None

    def side_by_side(self, joined: torch.Tensor) -> torch.Tensor:
        """[n, width, ..] of [tokens, ..]."""
        if self.tokens is None:
            texts = joined[self.start : self.start + self.shape[0] * self.shape[1]]
        else:
            texts = joined[self.tokens]
        return texts.unflatten(0, self.shape)

    def write(self, joined: torch.Tensor, texts: torch.Tensor) -> None:
        """Puts the texts' own tokens of [n, width, ..] into [tokens, ..]."""
        flat = texts.flatten(0, 1)
        joined[self.start : self.end] = flat[: self.end - self.start] if self.own is None else flat[self.own]


def group_texts(lengths: Sequence[int], num_tokens: int) -> list[Group]:
    """The groups of texts of these lengths, which must be ordered by width, in `num_tokens` joined tokens."""
    groups, start = [], 0
    for width, same in groupby(lengths, key=cpu_width):
        group = _group(torch.tensor(list(same)), width, start, num_tokens)
        groups.append(group)
        start = group.end
    return groups


def _group(lengths: torch.Tensor, width: int, start: int, num_tokens: int) -> Group:
    shape = len(lengths), width
    end = start + int(lengths.sum())
    own = torch.arange(width) < lengths[:, None]
    # A full text of a shared width is computed like the others, to the same bits
    mask = own[:, None, None] if width <= MAX_SHARED_WIDTH else None
    in_place = end == start + len(lengths) * width or (len(lengths) == 1 and start + width <= num_tokens)
    if in_place:
        return Group(shape, start, end, None, None, mask)
    firsts = start + lengths.cumsum(0) - lengths
    tokens = firsts[:, None] + torch.arange(width) * own
    return Group(shape, start, end, tokens.flatten(), own.flatten().nonzero()[:, 0], mask)


class UnpaddedModel:
    """Runs a model that `can_run` accepts; the model is changed for it.

    Args:
        model: of transformers, in evaluation mode on a CPU.
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        model.set_attn_implementation(ATTENTION)
        model.pooler = None  # its output, made from the first token, is never read
        self._model = model
        config = model.config
        self._first_position = config.pad_token_id + 1 if POSITIONS_AFTER_PADDING[config.model_type] else 0

    @staticmethod
    def can_run(model: Any) -> bool:
        is_known = type(model).__module__.startswith("transformers.models.")  # not a model repository's own code
        return is_known and model.config.model_type in POSITIONS_AFTER_PADDING and not model.config.is_decoder

    def pooled(self, ids: Sequence[Sequence[int]], pooling: str) -> torch.Tensor:
        """float32 [n, dimension]: the mean over each text's tokens, or its first one (`cls`).

        Args:
            ids: token ids of each text, ordered by width.
        """
        lengths = [len(row) for row in ids]
        joined = [token for row in ids for token in row]
        positions = [position for length in lengths for position in range(length)]
        unused = [0] * (-len(joined) % NUM_TOKENS_STEP)
        tokens = torch.tensor([joined + unused])
        groups = group_texts(lengths, tokens.shape[1])
        hidden = self._model(
            input_ids=tokens,
            position_ids=torch.tensor([positions + unused]) + self._first_position,
            token_type_ids=torch.zeros_like(tokens),
            groups=groups,
        ).last_hidden_state[0]
        return torch.cat([_pool(group.side_by_side(hidden).float(), group, pooling) for group in groups])


def _pool(hidden: torch.Tensor, group: Group, pooling: str) -> torch.Tensor:
    """[n, dimension] of [n, width, dimension]."""
    if pooling == "cls":
        return hidden[:, 0]
    if group.mask is None:
        return hidden.mean(dim=1)
    weights = group.mask[:, 0, 0, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    groups: Sequence[Group],
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """In the signature of transformers' attention functions: [1, heads, tokens, size] to [1, tokens, heads, size]."""
    inputs = [each[0].transpose(0, 1) for each in (query, key, value)]  # [tokens, heads, size]
    output = torch.zeros_like(inputs[0])
    for group in groups:
        queries, keys, values = (group.side_by_side(each).transpose(1, 2) for each in inputs)  # [n, heads, width, size]
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, scale=scaling
        )
        group.write(output, attended.transpose(1, 2))
    return output[None], None
