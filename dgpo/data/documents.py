"""Your own documents as a corpus for `retriever.build`: one passage a line, long documents cut by words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dgpo.config.load import ConfigError
from dgpo.data.lines import BadLines, read_objects
from dgpo.data.questions import contents
from dgpo.data.rows import DataError

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    """A title and all of its text."""

    title: str
    text: str


def read_documents(path: Path, bad: BadLines) -> list[Document]:
    """The documents of a folder (.txt and .md files at any depth, titled by their names) or of a json-lines file.

    A line is `{"title"?, "text"}`, or a passage `{"contents"}` whose first line is its title. Empty documents and files
    that are not UTF-8 go to `bad`.

    Raises:
        ConfigError: no such path, or one that holds no documents.
    """
    if path.is_dir():
        documents = list(_from_folder(path, bad))
    elif path.name.endswith(JSON_SUFFIXES):
        documents = list(_from_lines(path, bad))
    else:
        raise ConfigError(
            f"prepare.documents={path}: expected a folder of {' and '.join(TEXT_SUFFIXES)} files, or a "
            f"{' or '.join(JSON_SUFFIXES)} file"
        )
    bad.check()
    if not documents:
        raise DataError(f"{path} holds no documents: expected {' or '.join(TEXT_SUFFIXES)} files, or lines of json")
    return documents


def passages(documents: list[Document], *, words: int, overlap: int) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Corpus rows `{"id", "contents"}` in document order, ids counted from 0, and counts.

    A document of more than `words` words becomes passages of that many, each of which begins `overlap` words before the
    end of the one before; the last one may be shorter, but always has words of its own.

    Raises:
        ConfigError: an overlap that leaves no new words.
    """
    if words < 1 or not 0 <= overlap < words:
        raise ConfigError(
            f"prepare.passage_words={words} and prepare.passage_overlap={overlap}: expected at least one word, and a "
            "smaller overlap"
        )
    rows: list[dict[str, str]] = []
    counts = {"documents": len(documents), "cut_documents": 0, "passages": 0, "words": 0}
    for document in documents:
        all_words = document.text.split()
        starts = range(0, max(1, len(all_words) - overlap), words - overlap)
        counts["cut_documents"] += len(starts) > 1
        counts["words"] += len(all_words)
        for start in starts:
            text = " ".join(all_words[start : start + words])
            rows.append({"id": str(len(rows)), "contents": contents(document.title, text)})
    counts["passages"] = len(rows)
    return rows, counts


def write_corpus(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _from_folder(folder: Path, bad: BadLines) -> Iterator[Document]:
    for path in sorted(each for each in folder.rglob("*") if each.suffix in TEXT_SUFFIXES and each.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            bad.add(path, None, f"not UTF-8 ({error})")
            continue
        if text.strip():
            yield Document(path.stem, text)
        else:
            bad.add(path, None, "empty")


def _from_lines(path: Path, bad: BadLines) -> Iterator[Document]:
    for number, record in read_objects(path, bad):
        title, text = record.get("title", ""), record.get("text")
        if isinstance(record.get("contents"), str):
            title, _, text = record["contents"].partition("\n")
            title = title.strip().removeprefix('"').removesuffix('"')
        if not isinstance(text, str) or not text.strip():
            bad.add(path, number, f"no text: it has {', '.join(record) or 'no fields'}, expected `text` or `contents`")
        elif not isinstance(title, str):
            bad.add(path, number, f"`title` is {title!r}, expected a text")
        else:
            yield Document(title, text)
