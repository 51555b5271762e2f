"""Gold passages for NQ: the long answers of Google's own annotations, joined to NQ-open's questions by their text.

NQ-open (and FlashRAG's `nq`) keeps questions and short answers only. The annotations are published at
ai.google.com/research/NaturalQuestions: NQ-open's test questions come from their dev set
(`v1.0-simplified_nq-dev-all.jsonl.gz`), its training questions from their training set. Both published forms of a line
are read: the original with `document_tokens`, and the simplified one with `document_text`.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dgpo.data.lines import BadLines, read_objects
from dgpo.data.questions import Question, contents, question_key
from dgpo.errors import ConfigError
from dgpo.metrics.hits import answer_in_passages

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SPACE_BEFORE = re.compile(r" (?=[,.;:?!%)\]]|'s\b|n't\b)")
_SPACE_AFTER = re.compile(r"(?<=[(\[$]) ")


def join_long_answers(
    questions: Sequence[Question], annotations: Path, bad: BadLines
) -> tuple[list[Question], dict[str, int]]:
    """The questions, with the annotated long answer as gold passage where there is one, and counts.

    Args:
        annotations: a .jsonl or .jsonl.gz file, or a folder of such files.

    Returns:
        Questions in the same order; `with_long_answer`, `without_long_answer` (annotated, but as having none),
        `not_annotated`, and `answer_in_long_answer` of those with one.

    Raises:
        ConfigError: no such file, or a folder without one.
    """
    wanted = {question_key(question.text) for question in questions}
    found: dict[str, str | None] = {}
    for path in _files(annotations):
        for number, record in read_objects(path, bad):
            key = question_key(str(record.get("question_text", "")))
            if key not in wanted or found.get(key):
                continue
            try:
                found[key] = long_answer(record)
            except (KeyError, TypeError, IndexError) as error:
                bad.add(path, number, f"not a line of Natural Questions ({error!r})")
    bad.check()
    joined = []
    counts = Counter({"with_long_answer": 0, "without_long_answer": 0, "not_annotated": 0, "answer_in_long_answer": 0})
    for question in questions:
        key = question_key(question.text)
        passage = found.get(key)
        joined.append(replace(question, gold_passages=(passage,)) if passage else question)
        if passage:
            counts["with_long_answer"] += 1
            counts["answer_in_long_answer"] += answer_in_passages(question.golds, [{"contents": passage}])
        else:
            counts["without_long_answer" if key in found else "not_annotated"] += 1
    return joined, dict(counts)


def long_answer(record: Mapping[str, Any]) -> str | None:
    """The long answer that most annotators chose (the first of equals) as `"Title"\\ntext`; None where none chose one.

    Spans count tokens of the document, mark-up included; the mark-up is left out of the text.
    """
    spans = [(each["long_answer"]["start_token"], each["long_answer"]["end_token"]) for each in record["annotations"]]
    chosen = Counter(span for span in spans if span[0] >= 0).most_common(1)
    if not chosen:
        return None
    start, end = chosen[0][0]
    if "document_tokens" in record:
        tokens = [token["token"] for token in record["document_tokens"][start:end] if not token["html_token"]]
    else:
        tokens = [token for token in record["document_text"].split(" ")[start:end] if not _TAG.fullmatch(token)]
    text = " ".join(" ".join(tokens).replace("``", '"').replace("''", '"').split())
    text = _SPACE_AFTER.sub("", _SPACE_BEFORE.sub("", text))
    return contents(document_title(record), text) if text else None


def document_title(record: Mapping[str, Any]) -> str:
    """The page's title: its field, which the simplified form lacks, else the `title` of its URL."""
    if record.get("document_title"):
        return str(record["document_title"])
    query = urlsplit(html.unescape(str(record.get("document_url", "")))).query
    return parse_qs(query).get("title", [""])[0].replace("_", " ")


def _files(path: Path) -> list[Path]:
    files = (
        sorted(each for each in path.iterdir() if each.name.endswith((".jsonl", ".jsonl.gz")))
        if path.is_dir()
        else [path]
    )
    if not files or not files[0].is_file():
        raise ConfigError(
            f"prepare.nq_annotations={path}: no .jsonl or .jsonl.gz there; get NQ's simplified or original files, or "
            "leave it unset: NQ then has no gold passages"
        )
    return files
