from pathlib import Path

import pytest

from retriever.corpus import Corpus, scan_offsets
from retriever.errors import RetrieverError

ROW = b'{"id":"%d","contents":"\\"T\\"\\n%d"}'


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["no last newline", "last newline"])
def test_every_row_is_read_by_its_number(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(ROW % (row, row * row) for row in range(50)) + end)
    corpus = Corpus(path)
    assert len(corpus) == 50
    assert corpus[7] == {"id": "7", "contents": '"T"\n49'}
    assert corpus.raw(49) == ROW % (49, 49 * 49)
    with pytest.raises(IndexError, match="row 50 is outside the 50 rows"):
        corpus.raw(50)


def test_offsets_survive_block_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"".join(ROW % (row, row) + b"\n" for row in range(50)))
    whole = scan_offsets(path)
    monkeypatch.setattr("retriever.corpus.SCAN_BYTES", 7)
    assert scan_offsets(path).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "row 1 is not valid JSON"),
        (b"", "row 1 is not valid JSON"),
        (b"[1]", 'row 1: "id" is None'),
        (b'{"id":3,"contents":"a"}', 'row 1: "id" is 3'),
        (b'{"id":"3","text":"a"}', 'row 1: "contents" is None'),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(ROW % (0, 0) + b"\n" + line + b"\n")
    with pytest.raises(RetrieverError, match=message):
        list(Corpus(path))


def test_an_empty_corpus_and_a_changed_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"")
    with pytest.raises(RetrieverError, match="is empty"):
        Corpus(path)
    path.write_bytes(ROW % (0, 0) + b"\n")
    offsets = scan_offsets(path)
    path.write_bytes(ROW % (0, 1000) + b"\n")
    with pytest.raises(RetrieverError, match="offset table was made for"):
        Corpus(path, offsets)
