"""Your own documents as a corpus for `retriever.build`: one passage a line, long documents cut by words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from dgpo.data.lines import BadLines, read_objects
from dgpo.data.questions import contents
from dgpo.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".html", ".htm")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
QUESTIONS = "questions"  # how the name of a file of questions begins, in a folder that holds documents too
_UNSEEN = ("script", "style", "noscript", "template", "svg")  # elements whose text nobody reads


@dataclass(frozen=True)
class Document:
    """A title and all of its text."""

    title: str
    text: str


def read_documents(path: Path, bad: BadLines) -> list[Document]:
    """The documents of a folder or of a json-lines file.

    Of a folder, at any depth: .txt and .md files, titled by their names; .html and .htm, by their `<title>`; json
    lines, but for files whose name begins with `questions`.

    A line is `{"title"?, "text"}`, or a passage `{"contents"}` whose first line is its title. Empty documents and files
    that are not UTF-8 go to `bad`.

    Raises:
        ConfigError: no such path, or one that holds no documents.
    """
    if path.is_dir():
        documents = list(_from_folder(path, bad))
        for file in sorted(each for each in path.rglob("*") if each.name.endswith(JSON_SUFFIXES)):
            documents += [] if file.name.startswith(QUESTIONS) else _from_lines(file, bad)
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
    if overlap >= words:
        raise ConfigError(f"prepare.passage_overlap={overlap}: expected less than prepare.passage_words={words}")
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


def _from_folder(folder: Path, bad: BadLines) -> Iterator[Document]:
    for path in sorted(each for each in folder.rglob("*") if each.suffix in TEXT_SUFFIXES and each.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            bad.add(path, None, f"not UTF-8 ({error})")
            continue
        title = path.stem
        if path.suffix.startswith(".htm"):
            title, text = read_html(text, title=title)
        if text.strip():
            yield Document(title, text)
        else:
            bad.add(path, None, "empty")


def read_html(markup: str, *, title: str) -> tuple[str, str]:
    """Title and text of a page: what a reader sees, without scripts and styles; `title` where the page has none."""
    page = _Page()
    page.feed(markup)
    page.close()
    return " ".join("".join(page.title).split()) or title, " ".join(" ".join(page.text).split())


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []  # title and unseen elements that are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in (*_UNSEEN, "title"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[self._open.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.text.append(data)
        elif self._open == ["title"]:
            self.title.append(data)


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
