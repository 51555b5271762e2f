"""A lock-step rollout with the shape of Search-R1's and of the releases built on it, to measure others against.

Our own writing, after their behaviour: all episodes take every turn together, and nobody goes on before the last one
has finished. A turn has no stop strings: it runs to the end-of-sequence token or to its full budget; then its text is
cut after the first `</search>`, or without one after the first `</answer>`, and tokenised again. All searches of a turn
go out as one request and come back as one answer. The context of a turn is cut on the left to what the engine takes.

Left out, to the reference's advantage: the release's passes over the log-probs and its weight sync on every turn, the
padding to a multiple of the GPUs, and the rebuilding of the KV cache between turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo.agent.episode import EpisodeLimits, Policy
from dgpo.agent.protocol import INVALID_ACTION_TEXT, parse_action, render_observation, render_passages

# All queries of a turn -> the documents of each
BatchSearch = Callable[[list[str]], Awaitable[list[list[dict[str, Any]]]]]


@dataclass
class LockStepEpisode:
    """One question's episode; `context` is the prompt and everything since, as the next turn continues it."""

    name: str
    context: list[int]
    active: bool = True
    answer: str | None = None
    num_turns: int = 0
    num_searches: int = 0
    num_generated: int = 0  # tokens that the policy wrote, those that were cut off included
    num_kept: int = 0  # tokens of the turns' texts after the cut


async def run_lock_step(
    prompts: dict[str, list[int]],
    *,
    policy: Policy,
    search: BatchSearch,
    tokenizer: Any,
    limits: EpisodeLimits,
    max_context_tokens: int,
    max_observation_tokens: int,
) -> list[LockStepEpisode]:
    """Plays all episodes, `limits.max_turns` turns that may search and a last one that may not.

    Args:
        prompts: token ids of every episode's prompt, by its name.
        tokenizer: a Hugging Face tokenizer.
        max_context_tokens: of the context that a turn continues; older tokens are dropped.
        max_observation_tokens: of one observation; later tokens are dropped.
    """
    episodes = [LockStepEpisode(name, list(ids)) for name, ids in prompts.items()]
    for turn in range(limits.max_turns + 1):
        active = [episode for episode in episodes if episode.active]
        if not active:
            break
        generations = await asyncio.gather(
            *(
                policy.generate(
                    episode.context,
                    max_tokens=limits.max_turn_tokens,
                    stop=(),
                    seed=None,
                    request_id=f"{episode.name}/{turn}",
                )
                for episode in active
            )
        )
        written = [generation.token_ids for generation in generations]
        texts = [cut_turn(text) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        actions = [parse_action(text) for text in texts]
        queries = [action.content for action in actions if action.kind == "search" and action.content]
        found = iter(await search(queries) if queries and turn < limits.max_turns else ())
        replies = []
        for episode, ids, action in zip(active, written, actions, strict=True):
            episode.num_turns += 1
            episode.num_generated += len(ids)
            if action.kind == "answer":
                episode.answer = action.content
                episode.active = False
                replies.append("")
            elif action.kind == "search" and action.content and turn < limits.max_turns:
                episode.num_searches += 1
                replies.append(render_observation(render_passages(next(found))))
            else:
                replies.append(INVALID_ACTION_TEXT)
        kept = _encode(tokenizer, texts)
        observations = _encode(tokenizer, replies)
        for episode, turn_ids, reply_ids in zip(active, kept, observations, strict=True):
            episode.num_kept += len(turn_ids)
            context = episode.context + turn_ids + reply_ids[:max_observation_tokens]
            episode.context = context[-max_context_tokens:]
    return episodes


def cut_turn(text: str) -> str:
    """Through the first `</search>`; without one, through the first `</answer>`; else as it is."""
    for tag in ("</search>", "</answer>"):
        before, found, _ = text.partition(tag)
        if found:
            return before + tag
    return text


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
