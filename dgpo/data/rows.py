"""Rows of questions in the schema that Search-R1 and veRL read (parquet): reading, checking, writing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class DataError(ValueError):
    """A data file that cannot be used: names the file, the row, the field, what was seen and what was expected."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows, checked.

    Raises:
        DataError: no such file, no parquet, or a malformed row.
    """
    if not Path(path).exists():
        raise DataError(f"data file {path} does not exist: prepare it, or correct its path")
    try:
        rows = pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file ({error}): expected rows of questions in parquet") from None
    validate_rows(rows, path)
    return rows


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks and writes rows, atomically."""
    validate_rows(rows, path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), temporary)
    temporary.replace(path)


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
    """The accepted answers."""
    return list(row["reward_model"]["ground_truth"]["target"])


def row_id(row: Mapping[str, Any]) -> str:
    """An id that is unique over data sources: `extra_info.id`, else source, split and index."""
    info = row["extra_info"]
    return str(info.get("id") or f"{row['data_source']}-{info.get('split')}-{info['index']}")


def _problem(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row.get("data_source"), str):
        return f"`data_source` is {row.get('data_source')!r}, expected the name of the data set"
    prompt = row.get("prompt")
    if not (isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)):
        return f"`prompt` is {prompt!r}, expected [{{'role': 'user', 'content': '...'}}]"
    target = ((row.get("reward_model") or {}).get("ground_truth") or {}).get("target")
    if not (isinstance(target, list) and all(isinstance(gold, str) for gold in target)):
        return f"`reward_model.ground_truth.target` is {target!r}, expected a list of accepted answers"
    if not any(gold.strip() for gold in target):
        return f"`reward_model.ground_truth.target` is {target!r}: no accepted answer; drop the row or add one"
    info = row.get("extra_info")
    if not (isinstance(info, Mapping) and isinstance(info.get("index"), int)):
        return f"`extra_info` is {info!r}, expected {{'split': str, 'index': int}}"
    return None


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and bool(message.get("role")) and bool(message.get("content"))
