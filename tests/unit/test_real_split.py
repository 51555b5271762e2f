"""The split of docs/results/real-cpu.md: what shares a question or a passage, over any steps, stays together."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def real_split(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("real_split")


def question(name, *passages, source="nq", gold="g"):
    return {"id": name, "question": f"{name}?", "golden_answers": [gold], "source": source, "gold_passages": passages}


def test_components_lie_on_one_side_and_answers_that_train_are_marked(real_split, monkeypatch):
    monkeypatch.setattr(real_split, "NUM_VALIDATION", 1)
    questions = [
        question("a", "p1", gold="Paris"),
        question("b", "p1", "p2"),  # joined to a by p1
        question("c", "p2", source="musique"),  # and to b by p2: it trains, though of many hops
        question("d", "p3", gold="the paris"),
        question("e", "p4", source="hotpotqa", gold="Rome"),
        question("f", "p5"),
    ]
    transcripts = [
        {"run": "r", "id": "1", "question": "A", "golden_answers": ["Paris"]},  # the same question as a
        {"run": "r", "id": "2", "question": "F?", "golden_answers": ["Oslo"]},
        {"run": "r", "id": "3", "question": "of no file", "golden_answers": ["Bern"]},
    ]
    parts = real_split.split(questions, transcripts)
    sides = [{"a", "b", "c"}, {"f"}]
    assert [set(parts["train"]), set(parts["validation"])] in (sides, sides[::-1])
    assert (parts["test"], parts["multi_hop"]) == (["d"], ["e"])
    assert sorted(parts["transcripts"] + parts["validation_transcripts"]) == [1, 2, 3]
    assert 3 in parts["transcripts"]
    new = {"e"} if "a" in parts["train"] else {"d", "e"}  # d's answer trains with a
    assert set(parts["test_new_answer"]) == new


def test_the_committed_file_is_whole_and_its_parts_share_nothing(real_split):
    record = json.loads(real_split.TARGET.read_text())
    parts = record["parts"]
    of_questions = [parts[name] for name in ("train", "validation", "test", "multi_hop")]
    assert sum(map(len, of_questions)) == len(set().union(*of_questions))
    assert not set(parts["transcripts"]) & set(parts["validation_transcripts"])
    assert record["counts"] == {name: len(ids) for name, ids in parts.items()}
    assert len(parts["test"]) >= 2000


@pytest.mark.skipif("DGPO_REALDATA" not in os.environ, reason="DGPO_REALDATA names no folder of public files")
def test_the_committed_file_comes_out_again():
    assert subprocess.run([sys.executable, "scripts/real_split.py", "--check"], cwd=ROOT, check=False).returncode == 0
