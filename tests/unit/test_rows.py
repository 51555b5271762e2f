import copy
from pathlib import Path

import pytest

from dgpo.config.load import load_config
from dgpo.data.rows import (
    check_ids,
    read_rows,
    row_gold_passages,
    row_golds,
    row_hops,
    row_id,
    row_question,
    validate_rows,
    write_rows,
)
from dgpo.errors import DataError
from dgpo.rl.train import with_own_questions
from tests.unit.stubs import make_row

ROW = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer the given question. Question: who?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", "Ada Lovelace"]}},
    "extra_info": {"split": "train", "index": 4},
}


def test_the_trainer_reads_a_file_of_our_own_with_our_columns_alone(tmp_path):
    """veRL would let `agent_name` choose the loop that plays a row, and reads no name that ends otherwise."""
    foreign = {"agent_name": "tool_agent", "session_id": 3, "images": [b"x"], "tools_kwargs": {"a": 1}}
    rows = [{**make_row(number), **foreign} for number in range(3)]
    rows = [{**row, "extra_info": {**row["extra_info"], "need_tools_kwargs": True, "id": "q"}} for row in rows]
    write_rows(tmp_path / "theirs.pq", rows)
    config = load_config(["hardware=cpu", f"data.train_file={tmp_path / 'theirs.pq'}"])
    ours = with_own_questions(config, tmp_path).data
    assert (Path(ours.train_file).suffix, ours.validation_file) == (".parquet", None)
    (first, *_), theirs = read_rows(ours.train_file), read_rows(config.data.train_file)
    assert set(first) == {"data_source", "prompt", "reward_model", "extra_info"}
    assert set(first["extra_info"]) == {"index", "id", "corpus"}
    assert [row_golds(row) for row in read_rows(ours.train_file)] == [row_golds(row) for row in theirs]


def changed(path, value):
    row = copy.deepcopy(ROW)
    *parents, last = path.split(".")
    inner = row
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return row


def test_rows_survive_parquet(tmp_path):
    rows = [ROW, {**ROW, "question": "when?", "extra_info": {"split": "train", "index": 5, "corpus": "world-1"}}]
    write_rows(tmp_path / "new" / "a.parquet", rows)
    first, second = read_rows(tmp_path / "new" / "a.parquet")
    assert first["prompt"] == ROW["prompt"]
    assert first["extra_info"]["index"] == 4
    assert first["question"] is None
    assert (second["question"], second["extra_info"]["corpus"]) == ("when?", "world-1")
    assert row_golds(first) == ["Ada", "Ada Lovelace"]


def test_the_question_comes_from_its_field_or_from_the_prompt():
    assert row_question(ROW) == "who?"
    assert row_question({**ROW, "question": "when?"}) == "when?"


def test_ids_are_unique_over_data_sources():
    assert row_id(ROW) == "nq-train-4"
    assert row_id(changed("data_source", "hotpotqa")) == "hotpotqa-train-4"
    assert row_id(changed("extra_info.id", "0")) == "0"


@pytest.mark.parametrize("absent", [None, ""])
def test_a_row_without_an_id_of_its_own_goes_by_source_split_and_index(absent):
    assert row_id(changed("extra_info.id", absent)) == "nq-train-4"


@pytest.mark.parametrize("identity", [1.5, float("nan"), True, ["a"], {"a": 1}])
def test_an_id_is_a_text_or_a_whole_number(identity):
    """pandas makes NaN of a missing one: all those rows would be `nan`."""
    with pytest.raises(DataError, match=r"row 1: `extra_info.id` is .*, expected a text or a whole number, or none"):
        validate_rows([ROW, changed("extra_info.id", identity)], "a.parquet")


@pytest.mark.parametrize("second", ["x", "nq-train-4"])
def test_two_rows_with_one_id_are_named(second):
    """Given twice, or given to one and made for the other."""
    rows = [changed("extra_info.id", "x"), ROW, changed("extra_info.id", second)]
    with pytest.raises(DataError, match=rf"a.parquet, rows [01] and 2 have the id '{second}': give each"):
        check_ids(rows, "a.parquet")
    check_ids(rows[:2], "a.parquet")


def test_evidence_and_hops_survive_parquet_where_the_source_has_them(tmp_path):
    passages = [{"id": "q-gold-0", "contents": '"Ada"\nAda wrote it.'}]
    evidence = {**ROW, "extra_info": {"split": "test", "index": 0, "hops": 2, "gold_passages": passages}}
    write_rows(tmp_path / "a.parquet", [evidence, ROW])
    first, second = read_rows(tmp_path / "a.parquet")
    assert (row_gold_passages(first), row_hops(first)) == (passages, 2)
    assert (row_gold_passages(second), row_hops(second)) == ([], None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data_source", None, "`data_source` is None, expected the name"),
        ("prompt", "who?", "`prompt` is 'who\\?', expected"),
        ("prompt", [], "`prompt` is \\[\\], expected"),
        ("prompt", [{"role": "user"}], "`prompt` is .* expected"),
        ("reward_model", "rule", "`reward_model.ground_truth` is 'None', expected {'target'"),
        ("reward_model.ground_truth", "Ada", "`reward_model.ground_truth` is 'Ada', expected {'target'"),
        ("reward_model.ground_truth.target", "Ada", "target` is 'Ada', expected a list of accepted answers"),
        ("reward_model.ground_truth.target", [], "target` is \\[\\]: no accepted answer; drop the row or add one"),
        ("reward_model.ground_truth.target", [" "], "no accepted answer"),
        ("extra_info", None, "`extra_info` is None, expected"),
        ("extra_info.index", "4", "`extra_info` is .* expected"),
        ("extra_info.gold_passages", "a text", "gold_passages` is 'a text', expected a list of {'id': str"),
        ("extra_info.gold_passages", ["a text"], "gold_passages` is \\['a text'\\], expected a list of"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, path, value, message):
    with pytest.raises(DataError, match=f"a.parquet, row 1: .*{message}"):
        write_rows(tmp_path / "a.parquet", [ROW, changed(path, value)])
    assert list(tmp_path.iterdir()) == []


def test_source_paragraphs_beside_the_rows_are_not_read(tmp_path):
    write_rows(tmp_path / "a.parquet", [{**ROW, "metadata": {"context": ["long"]}}])
    assert list(read_rows(tmp_path / "a.parquet")[0]) == list(ROW)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path, reason in (
        (tmp_path / "absent.parquet", "does not exist"),
        (tmp_path, "is a folder"),
        ("", "is a folder"),
    ):
        with pytest.raises(DataError, match=f"{reason}.*: prepare it, or correct its path"):
            read_rows(path)
    (tmp_path / "a.parquet").write_text("question,answer\n")
    with pytest.raises(DataError, match=r"a.parquet is not a parquet file"):
        read_rows(tmp_path / "a.parquet")


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        write_rows(tmp_path / "a.parquet", [])
