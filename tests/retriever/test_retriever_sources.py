import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from retriever.corpus import Corpus, scan_offsets
from retriever.errors import CorpusError
from retriever.sources import find_corpora, import_corpus

LINES = [b'{"id": "a", "contents": "x\\u00e9", "url": "u"}', b'{"contents": "y", "id": "b"}']


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["no last newline", "last newline"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_kept_byte_for_byte(tmp_path: Path, suffix: str, end: bytes) -> None:
    source, copy = tmp_path / f"source{suffix}", tmp_path / "corpus.jsonl"
    content = b"\n".join(LINES) + end
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    offsets = import_corpus(source, copy)
    assert copy.read_bytes() == b"\n".join(LINES) + b"\n"
    assert offsets.tolist() == scan_offsets(copy).tolist()
    assert Corpus(copy, offsets).raw(1) == LINES[1]


def test_parquet_rows_become_json_lines(tmp_path: Path) -> None:
    table = pyarrow.table({"contents": ['"T"\nx', '"U"\ny'], "id": [7, 8], "extra": [1.0, 2.0]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    import_corpus(tmp_path / "c.parquet", tmp_path / "corpus.jsonl")
    assert list(Corpus(tmp_path / "corpus.jsonl")) == [
        {"id": "7", "contents": '"T"\nx'},
        {"id": "8", "contents": '"U"\ny'},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"id": "0", "contents": "x"}\n{"id": "1"}\n', 'c.jsonl row 1: "contents" is None'),
        ("c.jsonl", b"", "c.jsonl is empty"),
        ("c.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("c.jsonl.gz", gzip.compress(b"\n".join(LINES * 99))[:-20], "not a whole gzip file"),
        ("c.parquet", b"no parquet", "not a parquet file"),
        ("c.csv", b"id,contents", "unknown ending; expected .jsonl, .jsonl.gz, .parquet"),
        ("absent.jsonl", None, "does not exist"),
    ],
)
def test_what_is_no_corpus_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        import_corpus(tmp_path / name, tmp_path / "out.jsonl")


def test_parquet_without_the_columns_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": ["0"], "text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match="columns id, text; expected id and contents"):
        import_corpus(tmp_path / "c.parquet", tmp_path / "out.jsonl")


def test_a_folder_of_corpora_is_named_by_its_files(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no corpus"):
        find_corpora(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({}))
    assert list(find_corpora(tmp_path)) == ["a", "b", "c"]
    (tmp_path / "a.parquet").touch()
    with pytest.raises(CorpusError, match="both called 'a'"):
        find_corpora(tmp_path)
