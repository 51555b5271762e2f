import json

import pytest

from dgpo.data.documents import Document, passages, read_documents
from dgpo.data.lines import BadLines
from dgpo.errors import ConfigError, DataError


def texts(rows):
    return [row["contents"].split("\n")[1] for row in rows]


def test_long_documents_are_cut_with_overlap_and_counted():
    documents = [Document("A", "1 2 3 4 5 6 7"), Document("B", "x")]
    rows, counts = passages(documents, words=3, overlap=1)
    assert texts(rows) == ["1 2 3", "3 4 5", "5 6 7", "x"]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[2]["contents"] == '"A"\n5 6 7'
    assert counts == {"documents": 2, "cut_documents": 1, "passages": 4, "words": 8}


@pytest.mark.parametrize(
    ("num_words", "words", "overlap", "lengths"),
    [(6, 3, 0, [3, 3]), (7, 3, 0, [3, 3, 1]), (3, 3, 1, [3]), (4, 3, 1, [3, 2]), (5, 3, 2, [3, 3, 3]), (1, 5, 4, [1])],
)
def test_every_word_is_in_a_passage_and_the_last_has_new_ones(num_words, words, overlap, lengths):
    document = Document("A", " ".join(map(str, range(num_words))))
    rows, _ = passages([document], words=words, overlap=overlap)
    assert [len(text.split()) for text in texts(rows)] == lengths
    assert texts(rows)[-1].split()[-1] == str(num_words - 1)


@pytest.mark.parametrize(("words", "overlap"), [(3, 3), (3, 4)])
def test_an_overlap_that_never_ends_is_refused(words, overlap):
    with pytest.raises(ConfigError, match=r"prepare.passage_overlap=\d: expected less than prepare.passage_words=3"):
        passages([Document("A", "1 2")], words=words, overlap=overlap)


def test_a_folder_of_texts_is_titled_by_file_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "Ada Lovelace.txt").write_text("She wrote\nthe first program.\n")
    (tmp_path / "deep" / "notes.md").write_text("# Notes")
    (tmp_path / "image.png").write_bytes(b"\xff")
    documents = read_documents(tmp_path, BadLines())
    assert [document.title for document in documents] == ["Ada Lovelace", "notes"]
    assert texts(passages(documents, words=100, overlap=0)[0]) == ["She wrote the first program.", "# Notes"]


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"2 unusable lines.*a\.txt: not UTF-8 .*b\.txt: empty"):
        read_documents(tmp_path, BadLines())


def test_documents_come_from_json_lines_too(tmp_path):
    path = tmp_path / "docs.jsonl"
    lines = [{"title": "T", "text": "a b"}, {"text": "c"}, {"id": "0", "contents": '"U"\nd e'}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_documents(path, BadLines()) == [Document("T", "a b"), Document("", "c"), Document("U", "d e")]
    path.write_text('{"title": "T"}\n{"text": "a", "title": 3}\n{"contents": "only a title"}\n')
    with pytest.raises(DataError, match=r"line 1: no text: it has title, .*line 2: `title` is 3.*line 3: no text"):
        read_documents(path, BadLines())


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no documents"):
        read_documents(tmp_path, BadLines())
    with pytest.raises(ConfigError, match=r"prepare.documents=.*x.pdf: expected a folder"):
        read_documents(tmp_path / "x.pdf", BadLines())
