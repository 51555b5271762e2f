"""Sampling on a CPU by one random number per sequence, where vLLM draws one per token of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def sample_by_one_number() -> None:
    """To be called in the worker's process, before it builds its sampler.

    vLLM takes the largest of probability over exponential noise, which its CPU build draws twice for sequences with
    seeds: 8.7 ms a step for 64 of them and 3000 tokens. One number and the cumulative sum sample from the same
    distribution in 2.0 ms.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    TopKTopPSampler.forward_cpu = _forward_cpu


def draw(probabilities: torch.Tensor, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """Token ids [B] of one draw each from `probabilities` [B, V], which need not sum to 1.

    Row i uses `generators[i]`, one number of it, or the process's own generator. What a row draws depends on no other.
    """
    numbers = torch.rand(len(probabilities), dtype=torch.float64)
    for row, generator in generators.items():
        numbers[row] = torch.rand((), dtype=torch.float64, generator=generator)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # The first token whose sum exceeds the number: one of probability 0 never does so first.
    drawn = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=probabilities.shape[-1] - 1)  # a number that rounds up to the whole sum


def _forward_cpu(
    self: Any,
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In the place of vLLM's: what it returns beside the tokens are the logits or log-probs after top-k and top-p."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = apply_top_k_top_p(logits, k, p)
    returned = None
    if self.logprobs_mode == "processed_logits":
        returned = logits
    elif self.logprobs_mode == "processed_logprobs":
        returned = logits.log_softmax(dim=-1, dtype=torch.float32)
    return draw(logits.softmax(dim=-1, dtype=torch.float32), generators), returned
