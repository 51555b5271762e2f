import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from retriever.build import build_indexes
from retriever.corpus import Corpus, scan_offsets
from retriever.errors import RetrieverError
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


def test_parquet_rows_become_json_lines_with_all_their_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"contents": ['"T"\nx', '"U"\ny'], "id": [7, 8], "url": ["u", None], "tags": [["a"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    import_corpus(tmp_path / "c.parquet", tmp_path / "corpus.jsonl")
    assert list(Corpus(tmp_path / "corpus.jsonl")) == [
        {"contents": '"T"\nx', "id": "7", "url": "u", "tags": ["a"]},
        {"contents": '"U"\ny', "id": "8", "url": None, "tags": []},
    ]


def test_ids_are_alike_in_both_formats(tmp_path: Path) -> None:
    rows = [{"id": 7, "contents": "x", "url": "u"}, {"id": "8", "contents": "y", "url": "v"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[0]]), tmp_path / "c.parquet")
    import_corpus(tmp_path / "c.jsonl", tmp_path / "from_jsonl")
    import_corpus(tmp_path / "c.parquet", tmp_path / "from_parquet")
    assert [row["id"] for row in Corpus(tmp_path / "from_jsonl")] == ["7", "8"]
    assert Corpus(tmp_path / "from_parquet").raw(0) == Corpus(tmp_path / "from_jsonl").raw(0)


def test_a_column_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    table = pyarrow.table({"id": ["0"], "contents": ["x"], "image": [b"\xff"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(RetrieverError, match=r"column that JSON cannot hold .*bytes"):
        import_corpus(tmp_path / "c.parquet", tmp_path / "out.jsonl")


def shard(folder: Path, number: int, num: int) -> None:
    table = pyarrow.table({"id": [str(number)], "contents": [f"passage {number}"]})
    pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-{num:05d}.parquet")


@pytest.mark.parametrize("first", [0, 1])
def test_the_shards_of_a_table_become_one_index(tmp_path: Path, first: int) -> None:
    (tmp_path / "data").mkdir()
    for number in (2, 0, 1):
        shard(tmp_path / "data", first + number, 3)
    (tmp_path / "data" / "other.jsonl").write_bytes(LINES[0])
    found = find_corpora(tmp_path / "data")
    assert {name: len(files) for name, files in found.items()} == {"other": 1, "train": 3}
    folder = build_indexes({"train": found["train"]}, tmp_path, method="bm25")["train"]
    assert [row["contents"] for row in Corpus(folder / "corpus.jsonl")] == [
        f"passage {first + number}" for number in range(3)
    ]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, 0, 3)
    shard(tmp_path, 2, 3)
    with pytest.raises(RetrieverError, match="of the 3 shards of 'train', 1 are missing, the first is number 1"):
        find_corpora(tmp_path)


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
    with pytest.raises(RetrieverError, match=message):
        import_corpus(tmp_path / name, tmp_path / "out.jsonl")


def test_parquet_without_the_columns_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": ["0"], "text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(RetrieverError, match="columns id, text; expected id and contents"):
        import_corpus(tmp_path / "c.parquet", tmp_path / "out.jsonl")


def test_a_folder_of_corpora_is_named_by_its_files(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="holds no corpus"):
        find_corpora(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({}))
    assert list(find_corpora(tmp_path)) == ["a", "b", "c"]
    (tmp_path / "a.parquet").touch()
    with pytest.raises(RetrieverError, match="both called 'a'"):
        find_corpora(tmp_path)
