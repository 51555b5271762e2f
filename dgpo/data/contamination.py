"""`dgpo contamination`: questions that stand twice, in training and test, or that contain their own answer.

Texts are compared as answers are (`normalize_answer`). Two questions are *exact* duplicates where these are equal. A
test question is a *near* duplicate of a training question that holds at least `min_share` of its word n-grams; one that
is shorter than an n-gram can only match exactly. An answer that stands in its own question (on word boundaries) is
reported and never dropped: comparisons name it by their nature.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgpo.config.load import check_numbers
from dgpo.config.schema import Config, ContaminationConfig
from dgpo.data.rows import read_rows, row_golds, row_id, row_question
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text
from dgpo.metrics.exact_match import normalize_answer
from dgpo.metrics.hits import answer_in_passages

Row = Mapping[str, Any]
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Overlap:
    """A training question that is the same as a test question, or nearly.

    Attributes:
        test, train: row numbers.
        exact: equal after normalisation.
        share: of the test question's n-grams that the training question holds; 1 where exact.
    """

    test: int
    train: int
    exact: bool
    share: float


def find_overlaps(
    train: Sequence[str], test: Sequence[str], *, ngram: int = 8, min_share: float = 0.5
) -> Iterator[Overlap]:
    """Every pair of a training and a test question that are duplicates or near duplicates, by training row.

    The index is over the test questions' n-grams, so memory does not grow with the training set.
    """
    exact: dict[str, list[int]] = {}
    holders: dict[tuple[str, ...], list[int]] = {}
    num_grams: dict[int, int] = {}
    for row, text in enumerate(test):
        words = normalize_answer(text).split()
        exact.setdefault(" ".join(words), []).append(row)
        grams = _ngrams(words, ngram)
        num_grams[row] = len(grams)
        for gram in grams:
            holders.setdefault(gram, []).append(row)
    for row, text in enumerate(train):
        words = normalize_answer(text).split()
        same = exact.get(" ".join(words), [])
        yield from (Overlap(each, row, True, 1.0) for each in same)
        shared = Counter(each for gram in _ngrams(words, ngram) for each in holders.get(gram, ()))
        for each, count in sorted(shared.items()):
            share = count / num_grams[each]
            if share >= min_share and each not in same:
                yield Overlap(each, row, False, share)


def check_rows(
    train: Sequence[Row], tests: Mapping[str, Sequence[Row]], settings: ContaminationConfig
) -> dict[str, Any]:
    """The report: per set the number of questions, duplicates, overlaps with training, and answers in the question."""
    train_texts = [row_question(row) for row in train]
    report: dict[str, Any] = {
        "ngram": settings.ngram,
        "min_share": settings.min_share,
        "train": _within(train) if train else None,
        "tests": {},
    }
    for name, rows in tests.items():
        texts = [row_question(row) for row in rows]
        overlaps = list(find_overlaps(train_texts, texts, ngram=settings.ngram, min_share=settings.min_share))
        exact = {each.test for each in overlaps if each.exact}
        near = {each.test for each in overlaps} - exact
        report["tests"][name] = {
            **_within(rows),
            "exact_in_train": len(exact),
            "near_in_train": len(near),
            "overlaps": [
                {
                    "test_id": row_id(rows[each.test]),
                    "train_id": row_id(train[each.train]),
                    "exact": each.exact,
                    "share": round(each.share, 3),
                    "test_question": texts[each.test],
                    "train_question": train_texts[each.train],
                }
                for each in overlaps
            ],
        }
    return report


def contamination(config: Config) -> dict[str, Any]:
    """Checks `data.train_file` and `data.test_files`; writes `contamination.json` and `.md` below `run_dir`.

    Raises:
        ConfigError: no files are named, or settings that cannot work.
        DataError: a file cannot be read.
    """
    settings, data = config.contamination, config.data
    check_numbers(config)
    if not data.train_file and not data.test_files:
        raise ConfigError(
            "nothing to check: name data.train_file, and test sets, e.g. "
            "data.test_files.nq=data/prepared/nq_test.parquet"
        )
    train = read_rows(data.train_file) if data.train_file else []
    if config.dry_run:
        tests = ", ".join(f"{name} ({len(read_rows(path))})" for name, path in data.test_files.items())
        print(f"dry run: {len(train)} training questions would be compared with {tests or 'themselves'}")
        return {}
    report = check_rows(train, {name: read_rows(path) for name, path in data.test_files.items()}, settings)
    report["files"] = {"train": data.train_file, "tests": dict(data.test_files)}
    folder = Path(config.run_dir) / "contamination"
    atomic_write_text(folder / "contamination.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "contamination.md", markdown(report))
    _print(report)
    print(f"every pair: {folder / 'contamination.json'}")
    return report


HEAD = ("set", "questions", "repeated", "with other answers", "in train, exact", "near", "answer in question")
WIDTH_IN_FILES = 110  # a log has no width


def table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line per set, under `HEAD`."""
    lines = []
    sets = ([("train", report["train"])] if report["train"] else []) + list(report["tests"].items())
    for name, each in sets:
        overlap = [str(each[key]) if key in each else "-" for key in ("exact_in_train", "near_in_train")]
        counts = [str(each[key]) for key in ("questions", "duplicates", "conflicting_duplicates")]
        lines.append((name, *counts, *overlap, str(each["answers_in_question"])))
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The table, how it was made, and examples."""
    lines = [
        "# Contamination",
        "",
        f"Exact: equal after normalisation. Near: a training question holds at least {report['min_share']:g} of the "
        f"test question's {report['ngram']}-word sequences.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|---|{'---:|' * (len(HEAD) - 1)}",
        *(f"| {' | '.join(line)} |" for line in table(report)),
    ]
    for name, each in report["tests"].items():
        if each["overlaps"]:
            lines += ["", f"## {name} in training", ""]
            lines += [
                html.escape(
                    f"- {pair['test_question']} ({pair['test_id']}) / {pair['train_question']} ({pair['train_id']}), "
                    f"{'exact' if pair['exact'] else pair['share']}",
                    quote=False,
                )
                for pair in each["overlaps"][:NUM_EXAMPLES]
            ]
    return "\n".join(lines) + "\n"


def _within(rows: Sequence[Row]) -> dict[str, Any]:
    """What can be said of one set by itself."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(normalize_answer(row_question(row)), []).append(row)
    twice = [group for group in groups.values() if len(group) > 1]
    inside = [row for row in rows if answer_in_passages(row_golds(row), [{"contents": row_question(row)}])]
    return {
        "questions": len(rows),
        "duplicates": sum(len(group) - 1 for group in twice),
        "conflicting_duplicates": sum(_conflict(group) for group in twice),
        "duplicate_ids": [[row_id(row) for row in group] for group in twice],
        "answers_in_question": len(inside),
        "answer_in_question_ids": [row_id(row) for row in inside],
    }


def _conflict(group: Sequence[Row]) -> int:
    """Repeats of a question that share no answer with its first occurrence."""
    golds = [{normalize_answer(gold) for gold in row_golds(row)} for row in group]
    return sum(not golds[0] & other for other in golds[1:])


def _ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def _print(report: Mapping[str, Any]) -> None:
    shown = Table(title="Contamination")
    for column in HEAD:
        shown.add_column(column, justify="left" if column == "set" else "right")
    for line in table(report):
        shown.add_row(*line)
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH_IN_FILES).print(shown)
