"""Lines of json: written whole, read whole, and what of a growing file counts."""

import json
from dataclasses import dataclass

import pytest

from dgpo.files import append_jsonl, drop_records_after, read_jsonl, write_jsonl


@dataclass
class Inner:
    text: str


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    assert write_jsonl(path, iter([{"step": 1, "text": "a\u2028ü\n"}, {"step": 2, "inner": Inner("b")}])) == 2
    append_jsonl(path, [Inner("c")])
    assert read_jsonl(path) == [{"step": 1, "text": "a\u2028ü\n"}, {"step": 2, "inner": {"text": "b"}}, {"text": "c"}]
    assert path.read_bytes().count(b"\n") == 3


def test_what_json_has_no_form_for_is_an_error_and_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [{"step": 1}])
    with pytest.raises(TypeError, match="is no value of json"):
        write_jsonl(path, [{"step": 2}, {"step": object()}])
    assert read_jsonl(path) == [{"step": 1}]


def test_a_torn_line_counts_in_no_growing_file_and_is_an_error_in_a_finished_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path, growing=True) == []
    with pytest.raises(FileNotFoundError):
        read_jsonl(path)
    path.write_text('{"step": 1}\n{"ste')
    assert read_jsonl(path, growing=True) == [{"step": 1}]
    with pytest.raises(json.JSONDecodeError):
        read_jsonl(path)


def test_later_records_go_with_the_file_that_has_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert drop_records_after(path, 3) == []
    append_jsonl(path, [{"step": step} for step in (1, 2, 3)])
    assert drop_records_after(path, 2) == [{"step": 1}, {"step": 2}] == read_jsonl(path)
    assert drop_records_after(path, 0) == []
    assert not path.exists()
