"""The split of docs/results/real-cpu.md: which questions and transcripts train, validate and test.

    DGPO_REALDATA=FOLDER python scripts/real_split.py          # writes docs/results/real-cpu-split.json
    DGPO_REALDATA=FOLDER python scripts/real_split.py --check  # status 1: that file is not what comes out

Questions and transcripts that share a question or a gold passage stand on one side, over any number of steps. A side
with a transcript trains; of its components some are kept for validation. NQ and PopQA on the other side are the primary
test, multi-hop questions the secondary one, out of distribution.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.data.own import connected
from dgpo.data.questions import question_key
from dgpo.files import atomic_write_text
from dgpo.metrics.exact_match import normalize_answer

TARGET = Path(__file__).resolve().parents[1] / "docs" / "results" / "real-cpu-split.json"
FILES = ("questions.jsonl.gz", "search_r1_episodes.jsonl.gz", "passages.jsonl.gz")
PRIMARY = ("nq", "popqa")
NUM_VALIDATION = 200  # questions, at least

Record = Mapping[str, Any]


def split(questions: Sequence[Record], transcripts: Sequence[Record]) -> dict[str, list[Any]]:
    """Part -> ids in order: `train`, `validation`, `test`, `multi_hop` and `test_new_answer` of questions;
    `transcripts` and `validation_transcripts`, the transcripts' line numbers in their file, from 1.

    `test_new_answer`: those of `test` and `multi_hop` none of whose answers is the gold of something that trains.
    """
    keys = [{question_key(each["question"]), *each.get("gold_passages", ())} for each in (*questions, *transcripts)]
    groups = connected(keys)
    of_questions, of_transcripts = groups[: len(questions)], groups[len(questions) :]
    with_transcripts = set(of_transcripts)
    validation = _validation(questions, of_questions, with_transcripts)
    parts: dict[str, list[Any]] = {name: [] for name in ("train", "validation", "test", "multi_hop")}
    for question, group in zip(questions, of_questions, strict=True):
        if group in with_transcripts:
            part = "validation" if group in validation else "train"
        else:
            part = "test" if question["source"] in PRIMARY else "multi_hop"
        parts[part].append(question["id"])
    for name, wanted in (("transcripts", False), ("validation_transcripts", True)):
        parts[name] = [line for line, group in enumerate(of_transcripts, 1) if (group in validation) == wanted]
    trained = set(parts["train"])
    learnt = _answers(q for q in questions if q["id"] in trained)
    learnt |= _answers(transcripts[line - 1] for line in parts["transcripts"])
    tested = {*parts["test"], *parts["multi_hop"]}
    parts["test_new_answer"] = [q["id"] for q in questions if q["id"] in tested and not _answers([q]) & learnt]
    return parts


def _validation(questions: Sequence[Record], groups: Sequence[int], candidates: set[int]) -> set[int]:
    """Components with a question, in the order of a hash of their least id, until they hold `NUM_VALIDATION`."""
    members: dict[int, list[str]] = {}
    for question, group in zip(questions, groups, strict=True):
        if group in candidates:
            members.setdefault(group, []).append(question["id"])
    chosen: set[int] = set()
    count = 0
    for group in sorted(members, key=lambda each: hashlib.sha256(min(members[each]).encode()).digest()):
        if count >= NUM_VALIDATION:
            break
        chosen.add(group)
        count += len(members[group])
    return chosen


def _answers(records: Iterable[Record]) -> set[str]:
    return {normalize_answer(gold) for record in records for gold in record["golden_answers"]}


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def source() -> Path:
    """The folder that DGPO_REALDATA names."""
    folder = Path(os.environ.get("DGPO_REALDATA", ""))
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        sys.exit(f"DGPO_REALDATA={folder}: no {missing[0]} there; expected the folder of docs/results/real-cpu.md")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the unpacked files."""
    return {name: hashlib.sha256(gzip.decompress((folder / name).read_bytes())).hexdigest() for name in FILES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    folder = source()
    parts = split(read(folder / FILES[0]), read(folder / FILES[1]))
    record = {
        "files": digests(folder),
        "sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        "counts": {name: len(ids) for name, ids in parts.items()},
        "parts": parts,
    }
    text = json.dumps(record, separators=(",", ":")).replace("]", "]\n") + "\n"
    print(json.dumps(record["counts"]), record["sha256"])
    if check:
        return int(text != TARGET.read_text())
    atomic_write_text(TARGET, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
