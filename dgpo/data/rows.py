"""Rows of questions in the schema that Search-R1 and veRL read (parquet): reading, checking, writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo.errors import DataError
from dgpo.files import atomic_path

# The published training set keeps each question's ten source paragraphs in it: gigabytes that nothing reads.
UNREAD_COLUMNS = frozenset({"metadata"})


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a parquet file, checked, without `UNREAD_COLUMNS`.

    Raises:
        DataError: no such file, no parquet, or a malformed row.
    """
    if not Path(path).is_file():
        reason = "is a folder, expected one parquet file" if Path(path).is_dir() else "does not exist"
        raise DataError(f"data file {str(path)!r} {reason}: prepare it, or correct its path")
    try:
        columns = [name for name in pq.read_schema(path).names if name not in UNREAD_COLUMNS]
        rows = pq.read_table(path, columns=columns).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file ({error}): expected rows of questions in parquet") from None
    validate_rows(rows, path)
    return rows


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks rows and writes them as parquet, the file whole or not at all. Raises `DataError` as `read_rows` does."""
    validate_rows(rows, path)
    columns = list(dict.fromkeys(name for row in rows for name in row))  # pyarrow would keep the first row's only
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def trained_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What RL reads of a row. Other columns mean something to veRL, such as `agent_name`: which loop plays the row."""
    info = row["extra_info"]
    return {
        "data_source": row["data_source"],
        "prompt": [{"role": message["role"], "content": message["content"]} for message in row["prompt"]],
        "reward_model": {"style": "rule", "ground_truth": {"target": row_golds(row)}},
        "extra_info": {"index": info["index"], "id": info.get("id"), "corpus": info.get("corpus")},
    }


def validate_rows(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raises `DataError` for the first row that veRL or the episode loop could not use."""
    if not rows:
        raise DataError(f"{path} holds no rows: expected at least one question")
    for index, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}, row {index}: {problem}")


def row_question(row: Mapping[str, Any]) -> str:
    """The question's text: its own field if the file keeps one, else the end of the prompt."""
    if row.get("question"):
        return str(row["question"])
    return str(row["prompt"][-1]["content"]).rsplit("Question:", 1)[-1].strip()


def row_golds(row: Mapping[str, Any]) -> list[str]:
    """The accepted answers, at least one."""
    return list(row["reward_model"]["ground_truth"]["target"])


def row_gold_passages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The annotated evidence, `extra_info.gold_passages`: documents `{"id", "contents"}`; empty where there is none."""
    return list(row["extra_info"].get("gold_passages") or [])


def row_hops(row: Mapping[str, Any]) -> int | None:
    """How many passages the question needs one after another, `extra_info.hops`; None where the source does not say."""
    return row["extra_info"].get("hops")


def row_id(row: Mapping[str, Any]) -> str:
    """An id that is unique over data sources: `extra_info.id`, else source, split and index. See `check_ids`."""
    info = row["extra_info"]
    if info.get("id") not in (None, ""):
        return str(info["id"])
    return f"{row['data_source']}-{info.get('split')}-{info['index']}"


def is_id(value: object) -> bool:
    """Whether it can name a row: a text or a whole number, or None or "" for a row without a name of its own."""
    return value is None or type(value) in (str, int)


def check_ids(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Raises `DataError` for the first two rows with one `row_id`: their episodes would share seed and record.

    Training needs no such check: there a row is known by its place in the batch, and may stand in a file twice.
    """
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        first = seen.setdefault(row_id(row), index)
        if first != index:
            raise DataError(
                f"{path}, rows {first} and {index} have the id {row_id(row)!r}: give each an extra_info.id of its own"
            )


def by_source(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows under `name`; those of several data sources under these instead, in order of appearance."""
    sources: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sources.setdefault(row["data_source"], []).append(row)
    return sources if len(sources) > 1 else {name: list(rows)}


def _problem(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row.get("data_source"), str):
        return f"`data_source` is {row.get('data_source')!r}, expected the name of the data set"
    prompt = row.get("prompt")
    if not (isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)):
        return f"`prompt` is {prompt!r}, expected [{{'role': 'user', 'content': '...'}}]"
    truth = _field(row.get("reward_model"), "ground_truth")
    if not isinstance(truth, Mapping):
        return f"`reward_model.ground_truth` is {str(truth)[:60]!r}, expected {{'target': [accepted answers]}}"
    target = truth.get("target")
    if not (isinstance(target, list) and all(isinstance(gold, str) for gold in target)):
        return f"`reward_model.ground_truth.target` is {target!r}, expected a list of accepted answers"
    if not any(gold.strip() for gold in target):
        return f"`reward_model.ground_truth.target` is {target!r}: no accepted answer; drop the row or add one"
    info = row.get("extra_info")
    if not (isinstance(info, Mapping) and type(info.get("index")) is int):
        return f"`extra_info` is {info!r}, expected {{'split': str, 'index': int}}"
    if not is_id(info.get("id")):
        return f"`extra_info.id` is {info['id']!r}, expected a text or a whole number, or none"
    if not (info.get("corpus") is None or isinstance(info["corpus"], str)):
        return f"`extra_info.corpus` is {info['corpus']!r}, expected the name of a corpus, or none"
    if not (info.get("hops") is None or (type(info["hops"]) is int and info["hops"] > 0)):
        return f"`extra_info.hops` is {info['hops']!r}, expected a whole number from 1, or none"
    passages = info.get("gold_passages") or []
    if not (isinstance(passages, list) and all(isinstance(_field(p, "contents"), str) for p in passages)):
        return f"`extra_info.gold_passages` is {passages!r}, expected a list of {{'id': str, 'contents': str}}"
    return None


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _is_message(message: object) -> bool:
    texts = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
