"""`dgpo prepare`: the paper's question sets, or your own questions and documents, in the forms that all stages read.

Everything is read and checked before anything is written, and the folder appears whole: `<set>_test.parquet`,
`train.parquet`, `validation.parquet`, `corpus.jsonl` (as far as asked for), and `manifest.json` with what was kept,
dropped and cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgpo.config.load import check_numbers
from dgpo.config.schema import Config
from dgpo.data.benchmarks import BENCHMARKS, check_names, load_benchmark
from dgpo.data.contamination import find_overlaps
from dgpo.data.documents import passages, read_documents
from dgpo.data.lines import BadLines
from dgpo.data.natural_questions import join_long_answers
from dgpo.data.questions import SET_NAME, Question, question_rows, read_questions
from dgpo.data.rows import row_id, row_question, write_rows
from dgpo.errors import ConfigError, DataError
from dgpo.files import write_jsonl
from dgpo.metrics.exact_match import normalize_answer
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import writing
from dgpo.runs.replacing import check_target

Rows = list[dict[str, Any]]


def prepare(config: Config) -> Path:
    """Writes `prepare.out` and prints what it holds. Returns the folder.

    Raises:
        ConfigError: settings that do not go together, unknown sets; or the folder is there and `prepare.overwrite` is
            not set, or it is not `prepare`'s own.
        DataError: a source that is missing, has unusable lines, or another size than published.
    """
    check_numbers(config)
    settings = config.prepare
    out = Path(settings.out)
    own = settings.source is not None or settings.documents is not None
    check_target(
        out,
        key="prepare.out",
        stage="prepare",
        replace=settings.overwrite,
        flag="prepare.overwrite",
        inputs=(settings.source, settings.documents, settings.nq_annotations, *(() if own else (settings.benchmarks,))),
    )
    bad = BadLines(settings.max_bad_lines)
    counts: dict[str, Any] = {}
    train, tests = _own_questions(config, bad, counts) if own else _benchmarks(config, bad, counts)
    if settings.drop_overlap:
        train = _without_overlap(config, train, tests, counts)
    validation: Rows = []
    if not own:
        train, validation = take_validation(train, settings.validation_questions, seed=config.seed)
        counts["train"], counts["validation"] = {"questions": len(train)}, {"questions": len(validation)}
    corpus: list[dict[str, str]] = []
    if settings.documents:
        documents = read_documents(Path(settings.documents), bad)
        corpus, counts["corpus"] = passages(documents, words=settings.passage_words, overlap=settings.passage_overlap)
    counts["unusable_lines"] = len(bad.reasons)
    if config.dry_run:
        for line in (*bad.reasons, f"dry run: {out} would hold", *_summary(out, counts)):
            print(line)
        return out
    with writing(out) as folder:
        for name, rows in tests.items():
            write_rows(folder / f"{name}_test.parquet", rows)
        if train:
            write_rows(folder / "train.parquet", train)
        if validation:
            write_rows(folder / "validation.parquet", validation)
        if corpus:
            write_jsonl(folder / "corpus.jsonl", corpus)
        inputs = {name: getattr(settings, name) for name in ("source", "documents", "nq_annotations")}
        inputs |= {} if own else {"benchmarks": settings.benchmarks}
        inputs["unusable_lines"] = bad.reasons
        write_manifest(folder, stage="prepare", inputs=inputs, config=asdict(settings), counts=counts, seed=config.seed)
    for line in (*bad.reasons, *_summary(out, counts), f"next: {_next_command(out, config)}"):
        print(line)
    return out


def _next_command(out: Path, config: Config) -> str:
    settings = config.prepare
    if settings.documents is not None:
        return f"python -m retriever.build --corpus {out / 'corpus.jsonl'} --out indexes/{settings.name}"
    if settings.source is not None:
        return f"python -m dgpo test data.test_files.{settings.name}={out / f'{settings.name}_test.parquet'} ..."
    return f"python -m dgpo collect pair=qwen3b_05b data=prepared prepare.out={out}"


def _benchmarks(config: Config, bad: BadLines, counts: dict[str, Any]) -> tuple[Rows, dict[str, Rows]]:
    """Training rows (the sets one after the other) and test rows by set."""
    settings = config.prepare
    check_names(settings.test_sets, key="prepare.test_sets", training=False)
    check_names(settings.train_sets, key="prepare.train_sets", training=True)
    if not settings.test_sets and not settings.train_sets:
        raise ConfigError("prepare.test_sets and prepare.train_sets are empty: nothing to prepare")
    if settings.nq_annotations and "nq" not in settings.test_sets:
        raise ConfigError("prepare.nq_annotations is for the test set nq: add it to prepare.test_sets, or unset it")

    def load(name: str, *, training: bool) -> list[Question]:
        return load_benchmark(
            Path(settings.benchmarks),
            name,
            training=training,
            allow_other_sizes=settings.allow_other_sizes,
            bad=bad,
        )

    tests: dict[str, Rows] = {}
    for name in settings.test_sets:
        questions = load(name, training=False)
        if name == "nq" and settings.nq_annotations:
            questions, counts["nq_annotations"] = join_long_answers(questions, Path(settings.nq_annotations), bad)
        tests[name] = question_rows(questions, source=name, split="test", with_passages=True)
        counts[f"{name}_test"] = sizes = _question_counts(questions)
        if not sizes["with_gold_passages"] and (BENCHMARKS[name].has_evidence or name == "nq"):
            why = "set prepare.nq_annotations" if name == "nq" else "its metadata holds no known paragraphs"
            counts[f"{name}_without_gold_passages"] = sizes["questions"]
            print(f"note: no question of {name} has gold passages ({why}): ARCap measures no evidence on it")
    train: Rows = []
    for name in settings.train_sets:
        questions = load(name, training=True)
        train += question_rows(questions, source=name, split="train", with_passages=False)
        counts[f"{name}_train"] = {"questions": len(questions)}
    return train, tests


def _own_questions(config: Config, bad: BadLines, counts: dict[str, Any]) -> tuple[Rows, dict[str, Rows]]:
    """Training and test rows of `prepare.source`, tests by data source; none without one."""
    settings = config.prepare
    if not SET_NAME.fullmatch(settings.name):
        raise ConfigError(f"prepare.name={settings.name!r}: expected small letters, digits, _ and -")
    if settings.source is None:
        return [], {}
    path = Path(settings.source)
    questions = read_questions(path, bad)
    bad.check()
    if not questions:
        raise DataError(f'{path} holds no questions: expected lines like {{"question": "..", "answers": [".."]}}')
    train, test = split_questions(questions, test_share=settings.test_share, seed=config.seed)
    counts["train"] = {"questions": len(train)}
    tests: dict[str, list[Question]] = {}
    for question in test:
        tests.setdefault(question.data_source or settings.name, []).append(question)
    for name, group in tests.items():
        counts[f"{name}_test"] = _question_counts(group)
    return question_rows(train, source=settings.name, split="train", with_passages=False), {
        name: question_rows(group, source=name, split="test", with_passages=True) for name, group in tests.items()
    }


def take_validation(train: Rows, count: int, *, seed: int) -> tuple[Rows, Rows]:
    """(the rest, `count` rows drawn by seed, at most a tenth), both in their order. The choice is of hashes of ids."""
    ranked = sorted(range(len(train)), key=lambda i: hashlib.sha256(f"{seed}/{row_id(train[i])}".encode()).digest())
    chosen = set(ranked[: min(count, len(train) // 10)])
    rest = [row for index, row in enumerate(train) if index not in chosen]
    return rest, [row for index, row in enumerate(train) if index in chosen]


def split_questions(
    questions: Sequence[Question], *, test_share: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """(train, test). A question's own `split` counts; of the others `test_share` go to test, chosen by seed.

    Questions of the same normalised text stay together. The choice ranks hashes of seed and text, so that added
    questions move few of the others.
    """
    free: dict[str, list[Question]] = {}
    for question in questions:
        if question.split is None:
            free.setdefault(normalize_answer(question.text), []).append(question)
    ranked = sorted(free, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
    chosen = set(ranked[: round(test_share * len(ranked))])
    train: list[Question] = []
    test: list[Question] = []
    for question in questions:
        in_test = question.split == "test" if question.split else normalize_answer(question.text) in chosen
        (test if in_test else train).append(question)
    return train, test


def _without_overlap(config: Config, train: Rows, tests: Mapping[str, Rows], counts: dict[str, Any]) -> Rows:
    if not train or not tests:
        raise ConfigError("prepare.drop_overlap=true compares training with test questions: prepare both, or unset it")
    texts = [row_question(row) for row in train]
    dropped: set[int] = set()
    counts["dropped_overlap"] = {}
    for name, rows in tests.items():
        overlaps = find_overlaps(
            texts,
            [row_question(row) for row in rows],
            ngram=config.contamination.ngram,
            min_share=config.contamination.min_share,
        )
        found = {each.train for each in overlaps}
        counts["dropped_overlap"][name] = len(found)
        dropped |= found
    counts["dropped_overlap"]["all"] = len(dropped)
    if len(dropped) == len(train):
        raise DataError("every training question stands in a test set: nothing would be left to train on")
    return [row for index, row in enumerate(train) if index not in dropped]


def _question_counts(questions: Sequence[Question]) -> dict[str, int]:
    return {
        "questions": len(questions),
        "with_gold_passages": sum(bool(question.gold_passages) for question in questions),
        "with_hops": sum(question.hops is not None for question in questions),
    }


def _summary(out: Path, counts: Mapping[str, Any]) -> Iterator[str]:
    for name, values in counts.items():
        if isinstance(values, dict):
            yield f"{name}: {', '.join(f'{key} {value:,}' for key, value in values.items())}"
        elif values:
            yield f"{name}: {values:,}"
    yield f"written to {out}"
