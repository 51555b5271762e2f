"""Run folders with made-up episodes of known outcome, in the form that `python -m dgpo test` and RL leave."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
STATUSES = ("answered", "answered", "answered", "no_answer", "overflow", "search_failed")
QUERY = "city language"


@dataclass(frozen=True)
class Episode:
    """What is made up of one model's episode on one question."""

    model: str
    set_name: str
    number: int
    question: str
    em: int
    status: str
    num_searches: int
    hit: int = 0

    @property
    def episode_id(self) -> str:
        return f"{self.set_name}/{self.number}"


def make_episodes(names: Sequence[str], num_questions: int, *, seed: int = 0) -> list[Episode]:
    """Every model on every question, in sets `one` and `two`; the first question is hostile."""
    generator = random.Random(seed)
    episodes = []
    for number in range(num_questions):
        question = f"What is the language of city {number}? {HOSTILE if number == 0 else ''}"
        for name in names:
            status = generator.choice(STATUSES)
            em = int(status == "answered" and generator.random() < 0.5)
            set_name = "one" if number % 3 else "two"
            counts = (generator.randrange(4), generator.randrange(2))
            episodes.append(Episode(name, set_name, number, question, em, status, *counts))
    return episodes


def write_run(folder: Path, episodes: Sequence[Episode], *, words_per_passage: int = 12) -> Path:
    """The run folder of the episodes; each model has a checkpoint folder with the one tokenizer."""
    names = list(dict.fromkeys(episode.model for episode in episodes))
    tokenizer = make_tokenizer(folder / "checkpoint")
    results: dict[str, Any] = {"models": {}, "baseline": names[0], "difference_to_baseline": {}, "temperature": 0.0}
    for name in names:
        mine = [episode for episode in episodes if episode.model == name]
        place = folder / "test" / name
        place.mkdir(parents=True)
        with (place / "scores.jsonl").open("w") as scores, (place / "trajectories.jsonl").open("w") as trajectories:
            for episode in mine:
                scores.write(json.dumps(make_score(episode)) + "\n")
                trajectories.write(json.dumps(make_record(episode, tokenizer, words_per_passage)) + "\n")
        results["models"][name] = _summary(mine, folder / "checkpoint")
        if name != names[0]:
            results["difference_to_baseline"][name] = {"average": [0.0, -0.1, 0.1], "sets": {}}
    (folder / "test" / "results.json").write_text(json.dumps(results))
    return folder


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer that spells everything out but a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tags = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
    tokenizer.add_tokens([*tags, " language", " city", " people", " speak"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_score(episode: Episode) -> dict[str, Any]:
    return {
        "episode_id": episode.episode_id,
        "set": episode.set_name,
        "question": episode.question,
        "golds": ["Mongolian", HOSTILE] if episode.number == 0 else [f"gold{episode.number}"],
        "answer": (HOSTILE if episode.number == 0 else "Lao") if episode.status == "answered" else None,
        "status": episode.status,
        "em": float(episode.em),
        "num_searches": float(episode.num_searches),
        "hit": float(episode.hit),
        "kind": "even" if episode.number % 2 == 0 else "odd",
    }


def make_record(episode: Episode, tokenizer: Tokenizer, words_per_passage: int) -> dict[str, Any]:
    """The recorded tokens: a thought and a query, what was found, and an answer."""
    ids: list[int] = []
    mask: list[int] = []
    for generated, text in make_segments(episode, words_per_passage):
        piece = tokenizer.encode(text).ids
        ids += piece
        mask += [int(generated)] * len(piece)
    searches = [{"turn": turn, "query": QUERY, "documents": []} for turn in range(episode.num_searches)]
    return {
        "episode_id": episode.episode_id,
        "prompt_ids": [1, 2, 3],
        "response_ids": ids,
        "response_mask": mask,
        "log_probs": [-0.25] * len(ids),
        "searches": searches,
    }


def make_segments(episode: Episode, words_per_passage: int) -> Iterator[tuple[bool, str]]:
    hostile = HOSTILE if episode.number == 0 else ""
    for _ in range(episode.num_searches):
        yield True, f"<think>the é of {episode.model}{hostile}</think><search>{QUERY}</search>"
        yield False, f"\n\n<information>{hostile}{' people speak' * (words_per_passage // 2)}</information>\n\n"
    yield True, f"<think>so</think><answer>{hostile or 'Lao'}</answer>"


def _summary(episodes: Sequence[Episode], checkpoint: Path) -> dict[str, Any]:
    em = sum(episode.em for episode in episodes) / len(episodes)
    values = {"em": em, "em_ci95": [em, em], "f1": em, "answered": 0.5, "num_searches": 1.5, "hit": 0.5}
    sets = dict.fromkeys((episode.set_name for episode in episodes), values)
    return {
        "checkpoint": str(checkpoint),
        "num_questions": len(episodes),
        "average": values,
        "sets": sets,
        "slices": {},
    }


def write_training_episodes(folder: Path, *, teacher_log_probs: Sequence[float | None]) -> None:
    """RL's logged sample in step 10: one episode per entry, with its teacher's log-probs of that value, or without."""
    place = folder / "train" / "episodes"
    tokenizer = make_tokenizer(place)
    records = []
    for number, value in enumerate(teacher_log_probs):
        episode = Episode("student", "training", number, f"Training question {number}?", 0, "answered", 1)
        record = make_record(episode, tokenizer, 2)
        length = len(record["response_ids"])
        records.append(
            {
                **record,
                "episode_id": f"step 10/{number}",
                "step": 10,
                **{key: value for key, value in make_score(episode).items() if key not in ("set", "episode_id")},
                "student_log_probs": [-0.5] * length,
                "teacher_log_probs": None if value is None else [value] * length,
            }
        )
    (place / "step_10.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
