"""Questions from json lines, FlashRAG's or your own, and the data rows that they become."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import build_messages, normalize_question
from dgpo.data.lines import BadLines, read_objects
from dgpo.data.rows import is_id

ANSWER_FIELDS = ("golden_answers", "answers", "answer")
SPLITS = ("train", "test")
SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")  # it becomes a file's name, and a key of test.sets


@dataclass(frozen=True)
class Question:
    """One question of a source.

    Attributes:
        id: unique in its source.
        golds: accepted answers, at least one, none empty.
        hops: passages that are needed one after another, where the source says so.
        gold_passages: annotated evidence, each `"Title"\\ntext`.
        split: `train` or `test`, where the source says so.
        data_source: the set that it belongs to, where the source says so.
        documents: titles of the documents that answer it, where the source says so.
    """

    id: str
    text: str
    golds: tuple[str, ...]
    hops: int | None = None
    gold_passages: tuple[str, ...] = ()
    split: str | None = None
    data_source: str | None = None
    documents: tuple[str, ...] = ()


def read_questions(path: Path, bad: BadLines) -> list[Question]:
    """The questions of a .jsonl or .jsonl.gz file, in order. What cannot be used goes to `bad`, ids seen before too.

    A line is `{"question", "golden_answers" (or "answers", "answer"), "id"?, "split"?, "data_source"?, "document"?,
    "hops"?, "gold_passages"?, "metadata"?}`; without an id it gets its line number. `document` is a title or a list of
    them, `metadata` FlashRAG's (`evidence`).

    Raises:
        DataError: no such file.
    """
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, record in read_objects(path, bad):
        try:
            question = parse_question(record, default_id=str(number))
        except ValueError as error:
            bad.add(path, number, str(error))
            continue
        if question.id in line_of:
            bad.add(path, number, f"id {question.id!r} is also on line {line_of[question.id]}; ids must be unique")
            continue
        line_of[question.id] = number
        questions.append(question)
    return questions


def read_answered(path: Path, bad: BadLines) -> Iterator[tuple[int, Question, dict[str, Any]]]:
    """(line number, question, line) of a file of episodes: questions whose `response` holds the whole text of one.

    Raises:
        DataError: no such file; at its end, more lines than allowed that cannot be used.
    """
    for number, record in read_objects(path, bad):
        try:
            question = parse_question(record, default_id=str(number))
            if not isinstance(record.get("response"), str):
                raise ValueError(f"`response` is {record.get('response')!r}, expected the text of the episode")
        except ValueError as error:
            bad.add(path, number, str(error))
        else:
            yield number, question, record
    bad.check()


def parse_question(record: Mapping[str, Any], *, default_id: str) -> Question:
    """One line as a question. Raises `ValueError` with the reason where it cannot be used."""
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`question` is {text!r}, expected a text")
    field = next((name for name in ANSWER_FIELDS if name in record), None)
    if field is None:
        raise ValueError(f"no `golden_answers` (nor `answers`, `answer`); it has {', '.join(record)}")
    golds = record[field]
    golds = [golds] if isinstance(golds, str) else golds
    if not (isinstance(golds, list) and all(isinstance(gold, str) for gold in golds)):
        raise ValueError(f"`{field}` is {golds!r}, expected a text or a list of texts")
    golds = tuple(dict.fromkeys(gold.strip() for gold in golds if gold.strip()))
    if not golds:
        raise ValueError(f"`{field}` is {record[field]!r}: no accepted answer")
    split = record.get("split")
    if split not in (None, *SPLITS):
        raise ValueError(f"`split` is {split!r}, expected train or test")
    source = record.get("data_source")
    if source is not None and not (isinstance(source, str) and SET_NAME.fullmatch(source)):
        raise ValueError(f"`data_source` is {source!r}, expected small letters, digits, _ and -")
    documents = record.get("document") or []
    documents = [documents] if isinstance(documents, str) else documents
    if not (isinstance(documents, list) and all(isinstance(title, str) for title in documents)):
        raise ValueError(f"`document` is {documents!r}, expected a title or a list of them")
    hops = record.get("hops")
    if hops is not None and not (type(hops) is int and hops > 0):
        raise ValueError(f"`hops` is {hops!r}, expected a whole number from 1")
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ValueError(f"`metadata` is {str(metadata)[:60]!r}, expected an object")
    passages, hops_of_evidence = evidence(metadata)
    if record.get("gold_passages"):
        passages = tuple(_passage(each) for each in record["gold_passages"])
    identity = record.get("id")
    if not is_id(identity):
        raise ValueError(f"`id` is {identity!r}, expected a text or a whole number, or none")
    return Question(
        id=default_id if identity in (None, "") else str(identity),
        text=text.strip(),
        golds=golds,
        hops=hops or hops_of_evidence,
        gold_passages=passages,
        split=split,
        data_source=source,
        documents=tuple(documents),
    )


def evidence(metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """Gold passages and number of hops from FlashRAG's `metadata`; `((), None)` where it annotates none.

    MuSiQue: `question_decomposition`, one `support_paragraph` `{"title", "paragraph_text"}` per hop, in `metadata` or,
    as some copies of the file have it, in a `metadata` inside it. HotpotQA and
    2WikiMultiHopQA: the paragraphs of `context` whose titles `supporting_facts` names; a hop each. Sentences are joined
    with nothing between them in HotpotQA (`sentences`, which keep their spaces), with a space in 2Wiki (`content`).
    Passages are only given where all are there: some questions come without their paragraphs.
    """
    if isinstance(metadata.get("metadata"), Mapping):
        metadata = metadata["metadata"]
    steps = metadata.get("question_decomposition")
    if steps:
        support = [step.get("support_paragraph") or {} for step in steps]
        complete = all(each.get("title") and each.get("paragraph_text") for each in support)
        passages = [contents(each["title"], each["paragraph_text"]) for each in support] if complete else []
        return tuple(dict.fromkeys(passages)), len(steps)
    titles = list(dict.fromkeys((metadata.get("supporting_facts") or {}).get("title") or ()))
    if not titles:
        return (), None
    context = metadata.get("context") or {}
    glue, field = ("", "sentences") if "sentences" in context else (" ", "content")
    paragraphs = zip(context.get("title") or (), context.get(field) or (), strict=False)
    texts = {title: glue.join(parts).strip() for title, parts in paragraphs}
    complete = all(texts.get(title) for title in titles)
    return tuple(contents(title, texts[title]) for title in titles) if complete else (), len(titles)


def contents(title: str, text: str) -> str:
    """A passage as the corpus has it: the quoted title, a line break, the text in one line."""
    return f'"{" ".join(title.split())}"\n{" ".join(text.split())}'


def question_rows(
    questions: Iterable[Question], *, source: str, split: str, with_passages: bool
) -> list[dict[str, Any]]:
    """Data rows in the ecosystem's schema (docs/data.md), ids made unique over data sources by the source's name.

    Args:
        source: `data_source` of questions that have none of their own.
        with_passages: keep `gold_passages`; training carries every row to its workers, and does not read them.
    """
    return [
        _row(
            question if with_passages else replace(question, gold_passages=()),
            source=question.data_source or source,
            split=split,
            index=index,
        )
        for index, question in enumerate(questions)
    ]


def _row(question: Question, *, source: str, split: str, index: int) -> dict[str, Any]:
    identity = f"{source}-{question.id}"
    info: dict[str, Any] = {"id": identity, "index": index, "split": split}
    if question.hops:
        info["hops"] = question.hops
    if question.gold_passages:
        info["gold_passages"] = [
            {"id": f"{identity}-gold-{number}", "contents": passage}
            for number, passage in enumerate(question.gold_passages)
        ]
    return {
        "id": question.id,
        "question": normalize_question(question.text),
        "golden_answers": list(question.golds),
        "data_source": source,
        "prompt": build_messages(question.text),
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(question.golds)}},
        "extra_info": info,
    }


def _passage(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("contents"), str):
            return str(value["contents"])
        if isinstance(value.get("title"), str) and isinstance(value.get("text"), str):
            return contents(value["title"], value["text"])
    raise ValueError(f"a gold passage is {value!r}, expected a text, {{'title', 'text'}} or {{'contents'}}")


def question_key(text: str) -> str:
    """What makes two question texts the same question across releases of one data set: case, spaces, question mark."""
    return " ".join(text.lower().strip().rstrip("?").split())
