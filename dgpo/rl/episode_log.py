"""A small sample of RL's own episodes with their log-probs, for the report's episode browser.

`train/episodes/step_N.jsonl` holds one line per episode, and the folder a copy of the tokenizer:

    {"episode_id", "step", "question", "golds", "em", "num_searches", "hit", "status", "answer",
     "searches": [{"query"}], "prompt_ids", "response_ids", "response_mask", "student_log_probs",
     "teacher_log_probs" or null}

Log-probs are in nats, per response token, of the policy that the step updated and of the teacher; null where that did
not score the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dgpo.agent.protocol import parse_action
from dgpo.data.rows import row_question
from dgpo.files import write_jsonl

FOLDER = "episodes"
# What the records are made of, as the batch names it.
FIELDS = ("prompts", "responses", "response_mask", "old_log_probs", "raw_prompt", "reward_model")
DECIMALS = 4  # kept per log-prob


class EpisodeLog:
    """Writes the sample of a step.

    Args:
        folder: of the training stage.
        tokenizer: the student's.
        every: steps between samples, the first step included; None writes none.
        num_episodes: in a sample.
    """

    def __init__(self, folder: Path, tokenizer: Any, *, every: int | None, num_episodes: int) -> None:
        self.folder = folder / FOLDER
        self.tokenizer = tokenizer
        self.every = every
        self.num_episodes = num_episodes

    def write(
        self,
        step: int,
        keys: Sequence[str],
        *,
        scores: Sequence[Mapping[str, float]],
        teacher_log_probs: Mapping[str, torch.Tensor],
        fetch: Callable[[list[str]], Mapping[str, Any]],
    ) -> None:
        """Writes the sample, if the step is one of those that have one.

        Args:
            keys: of the batch's episodes.
            scores: of each episode, from `dgpo.agent.scoring`.
            teacher_log_probs: key -> [T] of the episodes that the teacher scored.
            fetch: keys -> the fields of `FIELDS`, one row per key: nested tensors, and lists of plain values.
        """
        if self.every is None or not (step == 1 or step % self.every == 0):
            return
        rows = choose_logged(
            [score["em"] for score in scores],
            scored=[key in teacher_log_probs for key in keys],
            played=[not score.get("error") for score in scores],
            num_logged=self.num_episodes,
        )
        if not rows:
            return
        data = fetch([keys[row] for row in rows])
        columns = {name: _rows(data[name]) for name in FIELDS}
        records = [
            self._record(
                step,
                keys[row],
                scores[row],
                {name: columns[name][place] for name in FIELDS},
                teacher_log_probs.get(keys[row]),
            )
            for place, row in enumerate(rows)
        ]
        if not (self.folder / "tokenizer.json").exists():
            self.tokenizer.save_pretrained(self.folder)
        write_jsonl(self.folder / f"step_{step}.jsonl", records)

    def _record(
        self,
        step: int,
        key: str,
        score: Mapping[str, float],
        fields: Mapping[str, Any],
        teacher_log_probs: torch.Tensor | None,
    ) -> dict[str, Any]:
        ids, mask = fields["responses"].tolist(), fields["response_mask"].tolist()
        actions = [parse_action(self.tokenizer.decode(turn)) for turn in _policy_turns(ids, mask)]
        return {
            "episode_id": f"step {step}/{key}",
            "step": step,
            "question": row_question({"prompt": fields["raw_prompt"]}),
            "golds": list(fields["reward_model"]["ground_truth"]["target"]),
            "em": score["em"],
            "num_searches": score["num_searches"],
            "hit": score["hit"],
            "status": _status(score),
            "answer": next((action.content for action in actions if action.kind == "answer"), None),
            "searches": [{"query": action.content} for action in actions if action.kind == "search"],
            "prompt_ids": fields["prompts"].tolist(),
            "response_ids": ids,
            "response_mask": mask,
            "student_log_probs": _rounded(fields["old_log_probs"]),
            "teacher_log_probs": None if teacher_log_probs is None else _rounded(teacher_log_probs),
        }


def choose_logged(
    correct: Sequence[float], *, scored: Sequence[bool], played: Sequence[bool], num_logged: int
) -> list[int]:
    """Rows of the sample, in batch order: half failed and half correct ones, those that the teacher scored first.

    Args:
        correct: 1 where the answer was right.
        scored: whether the teacher scored the episode.
        played: false for what stands in for an episode that raised.
        num_logged: how many; fewer where the batch is smaller, and more of one kind where the other lacks.
    """
    failed_rows, correct_rows = (
        sorted(
            (row for row, value in enumerate(correct) if played[row] and (value > 0.5) == right),
            key=lambda row: not scored[row],
        )
        for right in (False, True)
    )
    num_failed = max(num_logged - len(correct_rows), num_logged - num_logged // 2)
    chosen = failed_rows[:num_failed]
    return sorted([*chosen, *correct_rows[: num_logged - len(chosen)]])


def _rows(values: Any) -> list[Any]:
    return list(values.unbind() if isinstance(values, torch.Tensor) else values)


def _policy_turns(ids: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    """The runs of tokens that the policy wrote."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for generated, run in runs if generated]


def _status(score: Mapping[str, float]) -> str:
    return next((name for name in ("answered", "overflow", "search_failed") if score.get(name)), "no_answer")


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]
