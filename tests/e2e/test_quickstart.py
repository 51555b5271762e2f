"""The quickstart, cut short: every stage by its real command, from an empty folder to the report."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_metrics, run_command
from tests.unit.test_command_blocks import lines

pytestmark = pytest.mark.e2e

SHORT = [
    "collect.max_questions=320",
    "distill.epochs=3",
    "train.num_steps=2",
    "train.validate_every=2",
    "train.batch_size=32",
    "train.mini_batch_size=16",
    "hardware.micro_batch_size=16",
    "test.max_questions=60",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    result = run_command("-m", "dgpo", "quickstart", f"run_dir={folder}", "seed=3", *SHORT, timeout_s=900)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "dgpo" in result.stdout
    return folder


def test_the_summary_has_the_contracts_form(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["methods"]) == {"untrained", "teacher", "kd", "dgpo"}
    for method in summary["methods"].values():
        low, high = method["em_ci95"]
        assert 0 <= low <= method["em"] <= high <= 1
        assert method["num_questions"] == 60
    assert summary["methods"]["dgpo"]["teacher_term"] == "exact"
    assert summary["methods"]["kd"]["teacher_term"] is None
    assert summary["seed"] == 3
    assert {"collect", "distill", "train", "test", "total"} <= set(summary["wall_s"])
    assert summary["versions"]["verl"] == "0.9.1"


def test_training_stages_teach(run: Path):
    methods = json.loads((run / "summary.json").read_text())["methods"]
    assert methods["teacher"]["em"] > methods["kd"]["em"] >= methods["untrained"]["em"]
    assert methods["teacher"]["em"] > 0.6


def test_collected_episodes_keep_the_teachers_end_token_and_are_all_correct(run: Path):
    from transformers import AutoTokenizer

    from dgpo.agent.trajectory import read_trajectories

    tokenizer = AutoTokenizer.from_pretrained(run / "world" / "models" / "teacher")
    episodes = list(read_trajectories(run / "collect" / "episodes.jsonl"))
    assert episodes
    assert all(episode.status == "answered" for episode in episodes)
    assert all(episode.response_mask[-1] == 1 for episode in episodes)
    ended = sum(episode.response_ids[-1] == tokenizer.eos_token_id for episode in episodes)
    assert ended / len(episodes) > 0.95


def test_both_training_curves_and_the_report_are_there(run: Path):
    assert [record["step"] for record in read_metrics(run / "train" / "metrics.jsonl")] == [1, 2]
    assert read_metrics(run / "distill" / "metrics.jsonl")
    html = (run / "report.html").read_text()
    for word in ("untrained", "teacher", "dgpo", "&lt;search&gt;"):
        assert word in html
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import""", html)
    assert loads == [], "the report must open without a network"


def test_the_benchmarks_of_the_performance_page_run_as_printed(run: Path, tmp_path: Path):
    """Each line with its blanks filled in, and small."""
    world, trace = run / "world", tmp_path / "trace.json"
    fill = {"MODEL": run / "distill" / "model", "QUESTIONS.parquet": world / "data" / "test.parquet"}
    fill["FOLDER"] = run / "indexes"
    small = {
        "step.py": ["--steps", "2", "--folder", str(run), "--trace", str(trace), "train.batch_size=32"],
        "rollout.py": ["--rounds", "1", "--num-episodes", "16"],
        "evaluation.py": ["--repeat", "1", "--num-questions", "16"],
    }
    said = {}
    for line in lines(ROOT / "docs" / "performance.md"):
        python, script, *words = shlex.split(re.sub(r"\[[^]]*\]", "", line), comments=True)
        assert python == "python"
        name = Path(script).name
        result = run_command(script, *(str(fill.get(word, word)) for word in words), *small[name], timeout_s=300)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        said[name] = result.stdout.splitlines()
    assert set(said) == set(small)
    step = {line.split("  ")[0]: line.split()[-2:] for line in said["step.py"]}
    assert step["step"][1] == "100.0%"
    assert float(step["update actor"][0]) > 0
    assert {"gen", "update_actor"} <= {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    ratios = re.fullmatch(
        r"median ratio, ours to lock-step: wall time ([\d.]+), generated tokens ([\d.]+)", said["rollout.py"][-1]
    )
    assert ratios
    assert float(ratios[2]) < 1, "only what is kept is written"
    measured = json.loads(said["evaluation.py"][-1])
    assert measured["ours"]["episodes"] == 16
    assert measured["ratio"] > 0
