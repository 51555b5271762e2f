"""What the cold start trains on: episodes as token ids, split by question, and dealt out in batches to the ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

import torch
from torch.utils.data import Sampler

from dgpo.agent.seeds import derive_seed
from dgpo.agent.trajectory import Trajectory
from dgpo.coldstart.filter import APPENDED

IGNORE = -100  # the label of a token that is not trained (Hugging Face's convention)
# Batches whose examples are sorted by length together: less padding, yet every such group is a random sample.
BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class TrainingExample:
    """One episode: `response_mask` is 1 on the tokens that the policy wrote (EOS included), 0 on observations."""

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    corpus: str | None = None  # in which the question searches; None for the retriever's default
    end_was_appended: bool = False  # the last token, which nobody sampled: only the cross-entropy is trained on it

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory) -> TrainingExample:
        return cls(
            trajectory.prompt_ids,
            trajectory.response_ids,
            trajectory.response_mask,
            trajectory.corpus,
            end_was_appended=trajectory.counters.get(APPENDED, 0) > 0,
        )

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def labels(self) -> list[int]:
        """The token at each position of prompt and response if it is trained, else `IGNORE`."""
        trained = [i if m else IGNORE for i, m in zip(self.response_ids, self.response_mask, strict=True)]
        return [IGNORE] * len(self.prompt_ids) + trained


def collate(examples: Sequence[TrainingExample], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads on the right: under causal attention no trained position sees padding, so no attention mask is needed.

    Returns:
        `input_ids`, `labels`, and `appended` (1 on labels of the cross-entropy alone), [B, T]. No example gives one row
        of padding without a label: a rank that has nothing left in the last batch of an epoch must still take part in
        every forward and backward pass.
    """
    longest = max([len(example) for example in examples], default=2)
    appended = torch.zeros(max(len(examples), 1), longest, dtype=torch.bool)
    if not examples:
        padding = torch.full((1, longest), pad_token_id)
        return {"input_ids": padding, "labels": torch.full((1, longest), IGNORE), "appended": appended}
    for row, example in enumerate(examples):
        appended[row, len(example) - 1] = example.end_was_appended
    ids = [e.prompt_ids + e.response_ids + [pad_token_id] * (longest - len(e)) for e in examples]
    labels = [e.labels + [IGNORE] * (longest - len(e)) for e in examples]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "appended": appended}


def split_held_out(
    examples: Sequence[TrainingExample], *, share: float, seed: int
) -> tuple[list[TrainingExample], list[TrainingExample]]:
    """(training, held out): `share` of the questions, with all their episodes; rounded up, but never all of them.

    Equal prompts are one question.
    """
    questions = sorted({tuple(e.prompt_ids) for e in examples}, key=lambda ids: derive_seed(seed, "held-out", ids))
    held_out = set(questions[: min(ceil(share * len(questions)), len(questions) - 1)])
    training = [e for e in examples if tuple(e.prompt_ids) not in held_out]
    return training, [e for e in examples if tuple(e.prompt_ids) in held_out]


class StepBatches(Sampler[list[int]]):
    """One rank's micro-batches of every step of a training, as lists of indices.

    The batch of a step does not depend on the number of ranks or the size of a micro-batch: it holds `batch_size`
    examples of similar lengths, and each epoch holds every example once (one of its batches may be short). Rank r takes
    every `num_ranks`-th of them. All ranks get `num_micro_batches` lists a step, some of which may be empty.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.lengths, self.batch_size, self.micro_batch_size = lengths, batch_size, micro_batch_size
        self.num_steps, self.seed, self.rank, self.num_ranks = num_steps, seed, rank, num_ranks
        self.num_micro_batches = num_micro_batches(batch_size, micro_batch_size, num_ranks)

    def __len__(self) -> int:
        return self.num_steps * self.num_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in islice(self._batches(), self.num_steps):
            own = batch[self.rank :: self.num_ranks]
            for i in range(self.num_micro_batches):
                yield own[i * self.micro_batch_size : (i + 1) * self.micro_batch_size]

    def _batches(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            rng = random.Random(f"{self.seed}/{epoch}")
            order = rng.sample(range(len(self.lengths)), len(self.lengths))
            bucket_size = BATCHES_PER_BUCKET * self.batch_size
            for start in range(0, len(order), bucket_size):
                bucket = sorted(order[start : start + bucket_size], key=self.lengths.__getitem__)
                batches = [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
                rng.shuffle(batches)
                yield from batches
            epoch += 1


def num_micro_batches(batch_size: int, micro_batch_size: int, num_ranks: int) -> int:
    """Micro-batches that each rank computes in a step."""
    return ceil(ceil(batch_size / num_ranks) / micro_batch_size)
