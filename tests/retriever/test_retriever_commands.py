"""What goes wrong on the command lines of the retriever: one line that names it, code 1 or 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CASES = [
    ("serve --index nowhere", "nowhere is not an index folder"),
    ("serve --index junk.jsonl", "junk.jsonl is not an index folder"),
    ("serve --index größe=folder", "folder"),
    ("serve --index folder --port 65536", "--port: 65536"),
    ("serve --index folder --port x", "--port: x"),
    ("serve --index a=folder --default b", "--default 'b'"),
    ("serve --index folder --max-topk 0", "max_topk is 0"),
    ("serve --index folder --token-file nowhere", "nowhere"),
    ("serve --folder x", "--folder"),
    ("build --corpus nowhere --out o", "nowhere does not exist"),
    ("build --corpus junk.jsonl --out o --method bm25", "junk.jsonl"),
    ("build --corpus empty.jsonl --out o --method bm25", "retriever.build: empty.jsonl is empty"),
    ("build --corpus empty.parquet --out o --method bm25", "empty.parquet"),
    ("build --corpus folder --out o --method bm25", "folder holds no corpus"),
    ("build --corpus one.jsonl --out junk.jsonl --method bm25", "junk.jsonl is not a folder"),
    ("build --corpus one.jsonl --out o --method foo", "--method: invalid choice: 'foo'"),
    ("convert --index nowhere --out o", "nowhere is no index folder"),
    ("convert --index junk.jsonl --corpus one.jsonl --out o", "junk.jsonl is not a FAISS index file"),
    ("recall nowhere", "--index, --exact"),
]


@pytest.mark.parametrize(("line", "named"), CASES, ids=[line for line, _ in CASES])
def test_a_typed_mistake_is_one_line_that_names_it(line: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "junk.jsonl").write_bytes(b"\xff\xfe{")
    for name in ("empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "0", "contents": "a"}) + "\n")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    command, *words = line.split()
    words += ["--port", "0"] if command == "serve" and "--port" not in words else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", f"retriever.{command}", *words]
    ended = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    complaint = ended.stderr
    assert ended.returncode in (1, 2), complaint
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith(f"retriever.{command}: ")
    assert named in complaint
    assert sorted(tmp_path.rglob("*")) == before
