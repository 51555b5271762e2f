"""Write a tiny world to a folder: corpora, question files, tokenizer and the untrained models.

corpora/{world}.jsonl   one corpus per permuted world, and `real`
data/collect.parquet    questions for the teacher's episodes      (permuted worlds)
data/train.parquet      questions for RL                          (permuted worlds)
data/validation.parquet questions for choosing settings           (real world)
data/test.parquet       questions for the final table             (real world, no text shared with validation)
data/test_paraphrases.parquet  the same kind of questions in wordings that no training question uses
tokenizer/, models/student_untrained/, models/teacher_untrained/
world.json              the settings, for the stages that follow
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import build_messages, normalize_question
from dgpo.data.rows import write_rows
from dgpo.files import atomic_write_text, write_jsonl
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import writing
from dgpo.runs.replacing import check_target
from dgpo.tinyworld.models import STUDENT_SIZE, TEACHER_SIZE, make_model, save_model
from dgpo.tinyworld.oracle import template_texts
from dgpo.tinyworld.tokenizer import build_tokenizer
from dgpo.tinyworld.world import (
    Question,
    World,
    corpus_documents,
    load_real_world,
    permute_world,
    question_passages,
    sample_unique_questions,
    split_countries,
    world_names,
)

DATA_SOURCE = "tinyworld"


@dataclass(frozen=True)
class WorldSettings:
    seed: int
    num_worlds: int = 4  # permuted ones; a question does not tell which world it is from, so few are enough
    cities_per_country: int = 4
    test_fraction: float = 0.2  # share of the countries
    num_collect: int = 1200
    num_train: int = 3200
    num_validation: int = 256
    num_test: int = 600
    num_paraphrase: int = 200
    prompt_template: str = "{question}"


def real_world(settings: WorldSettings) -> tuple[World, list[str], list[str]]:
    """The real world and the ISO codes of its train and test countries."""
    world = load_real_world(cities_per_country=settings.cities_per_country)
    return world, *split_countries(world, test_fraction=settings.test_fraction, seed=settings.seed)


def build_world(out: Path, settings: WorldSettings) -> dict[str, int]:
    """Writes everything that the module's docstring lists below `out`; returns counts. The same seed, the same files.

    Raises:
        ConfigError: `out` exists.
    """
    check_target(out, key="--out", stage="world", replace=False)
    with writing(out) as folder:
        return _write_world(folder, settings)


def _write_world(out: Path, settings: WorldSettings) -> dict[str, int]:
    world, train_isos, test_isos = real_world(settings)
    permuted = [permute_world(world, name=f"permuted{i}", seed=settings.seed) for i in range(settings.num_worlds)]
    counts = {"worlds": 1 + len(permuted), "countries": len(world.countries), "test_countries": len(test_isos)}

    counts["passages"] = 0
    for each in (world, *permuted):
        documents = corpus_documents(each)
        counts["passages"] += len(documents)
        write_jsonl(out / "corpora" / f"{each.name}.jsonl", documents)

    worlds = {each.name: each for each in (world, *permuted)}
    country_split = dict.fromkeys(train_isos, "train") | dict.fromkeys(test_isos, "test")
    for split, questions in _question_sets(settings, world, permuted, train_isos, test_isos).items():
        rows = [
            question_row(
                question, world=worlds[corpus], split=split, index=i, country_split=country_split, settings=settings
            )
            for i, (corpus, question) in enumerate(questions)
        ]
        write_rows(out / "data" / f"{split}.parquet", rows)
        counts[f"{split}_questions"] = len(rows)

    tokenizer = build_tokenizer(world_names(world), template_texts())
    tokenizer.save_pretrained(out / "tokenizer")
    counts["vocabulary"] = len(tokenizer)
    for role, size in (("student", STUDENT_SIZE), ("teacher", TEACHER_SIZE)):
        model = make_model(size, tokenizer, seed=settings.seed)
        save_model(model, tokenizer, out / "models" / f"{role}_untrained")
        counts[f"{role}_parameters"] = model.num_parameters()
    atomic_write_text(out / "world.json", json.dumps(asdict(settings), indent=1) + "\n")
    write_manifest(out, stage="world", inputs={}, config=asdict(settings), counts=counts, seed=settings.seed)
    return counts


def _question_sets(
    settings: WorldSettings,
    world: World,
    permuted: Sequence[World],
    train_isos: Sequence[str],
    test_isos: Sequence[str],
) -> dict[str, list[tuple[str, Question]]]:
    """(corpus name, question) pairs of each split, in random order."""
    rng = random.Random(f"{settings.seed}/questions")
    # Every permuted world gets an equal share; all countries take part, because none of their facts are real.
    share = -(-(settings.num_collect + settings.num_train) // len(permuted))
    training = [
        (each.name, question)
        for each in permuted
        for question in sample_unique_questions(rng, each, list(each.countries), count=share)
    ]
    rng.shuffle(training)

    def halves(
        count: int, *, held_out: bool = False, exclude: frozenset[str] = frozenset()
    ) -> list[tuple[str, Question]]:
        """Real-world questions, half about train countries and half about test countries."""
        sizes = ((train_isos, count - count // 2), (test_isos, count // 2))
        drawn = [
            (world.name, question)
            for isos, size in sizes
            for question in sample_unique_questions(rng, world, isos, count=size, held_out=held_out, exclude=exclude)
        ]
        rng.shuffle(drawn)
        return drawn

    validation = halves(settings.num_validation)
    test = halves(settings.num_test, exclude=frozenset(question.text for _, question in validation))
    return {
        "collect": training[: settings.num_collect],
        "train": training[settings.num_collect : settings.num_collect + settings.num_train],
        "validation": validation,
        "test": test,
        "test_paraphrases": halves(settings.num_paraphrase, held_out=True),
    }


def question_row(
    question: Question,
    *,
    world: World,
    split: str,
    index: int,
    country_split: Mapping[str, str],
    settings: WorldSettings,
) -> dict[str, Any]:
    """A data row; `extra_info.corpus` names the world that the agent searches in.

    Its gold passages are those that state the facts that the question needs, in the order in which it needs them.
    """
    passages = question_passages(question, world)
    return {
        "data_source": DATA_SOURCE,
        "question": normalize_question(question.text),
        "prompt": build_messages(question.text, settings.prompt_template),
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [question.answer]}},
        "extra_info": {
            "id": f"{DATA_SOURCE}-{split}-{index}",
            "index": index,
            "split": split,
            "corpus": world.name,
            "hops": len(passages),
            "gold_passages": [{"id": f"gold-{i}", "contents": text} for i, text in enumerate(passages)],
            "kind": question.kind,
            "relation": question.attribute or "country",
            "country_split": country_split[question.iso],
            "held_out_paraphrase": question.held_out_paraphrase,
        },
    }
