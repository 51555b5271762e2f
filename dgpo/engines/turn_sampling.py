"""How a turn is sampled: vLLM's sampling parameters, the same for RL's rollout servers and for our own engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sampling_arguments(
    tokenizer: Any,
    *,
    temperature: float,
    max_tokens: int,
    stop: Sequence[str],
    seed: int | None,
    log_probs: bool,
    streamed: bool = False,
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for one turn of an episode. Imports vllm: call it where an engine runs.

    Args:
        tokenizer: the engine's.
        temperature: 0 decodes greedily.
        max_tokens: more than 0.
        stop: strings after which the turn ends; the token that completes one is kept.
        seed: of this turn alone; None samples from the engine's stream. Ignored when greedy.
        log_probs: whether those of the sampled tokens are wanted.
        streamed: whether the text is wanted while it is written.
    """
    from vllm.sampling_params import RequestOutputKind

    return {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stop": list(stop),
        "stop_token_ids": _single_tokens(tokenizer, stop),
        "include_stop_str_in_output": True,
        "detokenize": bool(stop) or streamed,
        "skip_special_tokens": False,  # a tokenizer may hold the tags as special tokens: they still stop a turn
        "spaces_between_special_tokens": False,  # the text that is parsed has none
        "logprobs": 0 if log_probs else None,  # 0: the sampled token's only
        "seed": seed if temperature > 0 else None,
        # An output for every token, with all its log-probs, would keep the front end's one thread busy.
        "output_kind": RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
        "skip_clone": True,  # made for this request alone
    }


def _single_tokens(tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """Ids of the stop strings that are one token: the engine ends a turn on these by itself.

    Stop strings are found in the text, outside of the engine, which meanwhile writes a token or two for nothing.
    """
    ids = [(string, tokenizer.convert_tokens_to_ids(string)) for string in stop]
    return [token for string, token in ids if token is not None and tokenizer.convert_ids_to_tokens(token) == string]
