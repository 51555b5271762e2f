"""A folder of documents and questions as passages, and as questions to train on and to hold out.

Training and held-out questions share no document: a student that remembers a text must not look like one that searches.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from dgpo.config.schema import Config
from dgpo.data.documents import JSON_SUFFIXES, QUESTIONS, Document, passages, read_documents
from dgpo.data.lines import BadLines
from dgpo.data.questions import Question, question_rows, read_questions
from dgpo.data.rows import write_rows
from dgpo.errors import DataError
from dgpo.files import write_jsonl
from dgpo.metrics.exact_match import normalize_answer
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import writing

NAME = "own"  # data_source of questions that name none


def prepare_own(source: Path, out: Path, *, config: Config) -> dict[str, int]:
    """Writes `corpus.jsonl`, `train.parquet`, `<set>_test.parquet` and a manifest. Returns the counts.

    Args:
        source: a folder of documents (`dgpo.data.documents`), and of questions in files `questions*.jsonl`.
        config: `prepare` sizes passages and says what share of the documents is held out. A dry run writes nothing.

    Raises:
        DataError: no documents, unusable lines, or too few questions to train on and to hold out.
    """
    settings = config.prepare
    bad = BadLines(settings.max_bad_lines)
    documents = read_documents(source, bad)
    questions = [question for file in question_files(source) for question in read_questions(file, bad)]
    bad.check()
    rows, counts = passages(documents, words=settings.passage_words, overlap=settings.passage_overlap)
    train, held_out, dropped = split_by_document(questions, documents, test_share=settings.test_share, seed=config.seed)
    if questions and not (train and held_out):
        raise DataError(
            f"{len(questions)} questions on {len(documents)} documents leave {len(train)} to train on and "
            f"{len(held_out)} to hold out, which must share no document: add questions on other documents, or change "
            f"prepare.test_share={settings.test_share}"
        )
    counts |= {"questions": len(questions), "train": len(train), "held_out": len(held_out), "dropped": dropped}
    if config.dry_run:
        return counts
    with writing(out) as folder:
        write_jsonl(folder / "corpus.jsonl", rows)
        if train:
            write_rows(folder / "train.parquet", question_rows(train, source=NAME, split="train", with_passages=True))
        for name, group in by_set(held_out).items():
            write_rows(
                folder / f"{name}_test.parquet", question_rows(group, source=name, split="test", with_passages=True)
            )
        inputs = {"source": str(source), "unusable_lines": bad.reasons}
        write_manifest(folder, stage="own", inputs=inputs, config=asdict(settings), counts=counts, seed=config.seed)
    return counts


def question_files(source: Path) -> list[Path]:
    """The files of questions in a folder, by name."""
    found = (each for each in source.rglob(f"{QUESTIONS}*") if each.name.endswith(JSON_SUFFIXES))
    return sorted(found)


def by_set(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Questions by their data source."""
    sets: dict[str, list[Question]] = {}
    for question in questions:
        sets.setdefault(question.data_source or NAME, []).append(question)
    return sets


def split_by_document(
    questions: Sequence[Question], documents: Sequence[Document], *, test_share: float, seed: int
) -> tuple[list[Question], list[Question], int]:
    """(train, held out, how many were dropped): no document answers a question of both.

    Questions that share a document stay together. A group goes where a question of it says (`split`), test first; of
    the others, groups are held out in the order of their hashes until `test_share` of these questions are. Training
    questions in a held-out group are dropped.
    """
    titles = answering_titles(questions, documents)
    groups = connected(titles)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    fixed = {g for g, group in members.items() if any(questions[i].split for i in group)}
    held_out = {g for g in fixed if any(questions[i].split == "test" for i in members[g])}
    free = [g for g in members if g not in fixed]
    free.sort(key=lambda g: hashlib.sha256(f"{seed}/{questions[members[g][0]].text}".encode()).digest())
    wanted = test_share * sum(len(members[g]) for g in free)
    taken = 0
    for g in free:
        if taken + len(members[g]) / 2 <= wanted:
            held_out.add(g)
            taken += len(members[g])
    train = [q for q, g in zip(questions, groups, strict=True) if g not in held_out]
    test = [q for q, g in zip(questions, groups, strict=True) if g in held_out and q.split != "train"]
    return train, test, len(questions) - len(train) - len(test)


def answering_titles(questions: Sequence[Question], documents: Sequence[Document]) -> list[set[str]]:
    """Titles of the documents that answer each question: as it says, by its gold passages, or the likeliest one.

    That is, of the documents that hold a gold, the one that shares most with the question, rare words first (the sum of
    their inverse document frequencies); none where no document holds a gold.
    """
    texts = [f" {normalize_answer(f'{document.title} {document.text}')} " for document in documents]
    words = [set(text.split()) for text in texts]
    frequency = Counter(word for each in words for word in each)
    found = []
    for question in questions:
        named = {passage.partition("\n")[0].strip('"') for passage in question.gold_passages}
        if question.documents or named:
            found.append({*question.documents, *named})
            continue
        golds = [normalize_answer(gold) for gold in question.golds]
        asked = set(normalize_answer(question.text).split())
        best = max(
            (
                (sum(math.log(len(texts) / frequency[word]) for word in asked & words[i]), -i)
                for i, text in enumerate(texts)
                if any(f" {gold} " in text for gold in golds if gold)
            ),
            default=None,
        )
        found.append(set() if best is None else {documents[-best[1]].title})
    return found


def connected(titles: Sequence[set[str]]) -> list[int]:
    """The group of each question: the same number where a chain of shared titles leads from one to the other."""
    parent = list(range(len(titles)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, each in enumerate(titles):
        for title in each:
            parent[root(index)] = root(first.setdefault(title, index))
    return [root(index) for index in range(len(titles))]
