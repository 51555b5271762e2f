"""The tiny world's stages as SLURM jobs on two nodes: straight through, and through a warning, a requeue from outside
and a lost node, to the same report.
"""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TinyWorld, read_metrics
from tests.engine.same_run import assert_same_run
from tests.slurm.cluster import Slurm, slurm_cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.engine]

NUM_STEPS = 5
SMALL = [
    "collect.max_questions=64",
    "hardware.engine.concurrency=1",  # slow enough to be requeued in the middle
    "distill.max_steps=20",
    "distill.evaluate_every=10",
    f"train.num_steps={NUM_STEPS}",
    "train.batch_size=8",
    "train.mini_batch_size=8",
    "train.save_every=2",
    "train.generation_concurrency=1",  # repeatable to the last bit
    "hardware.micro_batch_size=4",
    "test.max_questions=32",
    "test.models.dgpo={run_dir}/train/model",
]
STAGES = ("collect", "distill", "train", "test")


@pytest.fixture(scope="module")
def slurm():
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with slurm_cluster() as cluster:
        yield cluster


def launch(slurm: Slurm, world: TinyWorld, run_dir: Path) -> dict[str, str]:
    """Submits the chain. Returns the job numbers by stage."""
    own = ("run_dir=", "retriever.url=", "train.init=")
    inputs = [override for override in world.overrides(run_dir) if not override.startswith(own)]
    indexes = [f"--index {path.name}={path}" for path in sorted(world.indexes.iterdir()) if path.is_dir()]
    output = slurm.run(
        *(sys.executable, "-m", "dgpo.slurm", f"--node-tmp={slurm.local}", "--time=60", "--lead-s=300"),
        *(f"--activate=cd {ROOT}; export PATH={Path(sys.executable).parent}:$PATH RAY_worker_niceness=0",),
        *("--retriever", f"{' '.join(indexes)} --default real"),
        *(*inputs, "hardware.num_nodes=2", f"run_dir={run_dir}"),
        *(f"data.test_files.real={world.folder / 'data' / 'test.parquet'}", *SMALL),
        timeout_s=180,
    )
    return {line.partition(":")[0]: line.split()[2].rstrip(",") for line in output.splitlines() if ": job " in line}


def finish(slurm: Slurm, jobs: dict[str, str], run_dir: Path, *, timeout_s: float = 1200) -> None:
    for stage, number in jobs.items():
        try:
            slurm.wait(number, "COMPLETED", timeout_s=timeout_s)
        except AssertionError as error:
            logs = sorted((run_dir / "logs").glob(f"{stage}-*.log"))
            raise AssertionError(f"{stage}: {error}\n" + "\n".join(p.read_text()[-3000:] for p in logs)) from error


@pytest.fixture(scope="module")
def straight(slurm, tiny_world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(slurm, launch(slurm, tiny_world, run_dir), run_dir)
    return run_dir


def test_the_stages_run_one_after_the_other_on_both_nodes(straight):
    for stage in STAGES:
        (log,) = (straight / "logs").glob(f"{stage}-[0-9]*.log")
        assert "Ray on n1 n2" in log.read_text()
    assert [record["step"] for record in read_metrics(straight / "train" / "metrics.jsonl")] == [
        *range(1, NUM_STEPS + 1)
    ]
    assert (straight / "report.html").exists()
    assert not list((straight / "slurm").glob("job-*"))


def test_a_run_that_was_warned_requeued_and_lost_a_node_ends_in_the_same_report(slurm, tiny_world, straight, tmp_path):
    run_dir = tmp_path / "run"
    metrics = run_dir / "train" / "metrics.jsonl"
    jobs = launch(slurm, tiny_world, run_dir)
    train = jobs["train"]
    partial = run_dir / "collect" / "trajectories.jsonl.partial"
    slurm.wait_until(lambda: partial.exists() and partial.stat().st_size > 0, timeout_s=300)
    slurm.run("scontrol", "requeue", jobs["collect"])  # as an administrator would
    finish(slurm, {stage: jobs[stage] for stage in ("collect", "distill")}, run_dir)

    slurm.wait_until(lambda: len(read_metrics(metrics)) >= 1, timeout_s=400)
    slurm.run("scancel", "--signal=USR1", "--batch", train)  # what SLURM sends before the time limit
    slurm.wait_until(lambda: slurm.job(train)["Restarts"] == "1", timeout_s=200)
    saved = len(read_metrics(metrics))
    slurm.wait_until(lambda: len(read_metrics(metrics)) > saved, timeout_s=400)
    slurm.kill_node("n2")
    slurm.wait_until(lambda: slurm.job(train)["Restarts"] == "2", timeout_s=200)
    slurm.start_node("n2")
    finish(slurm, jobs, run_dir)

    assert_same_run(run_dir / "train", straight / "train")
    assert results(run_dir) == results(straight)
    assert (run_dir / "report.html").exists()


def results(run_dir: Path) -> dict[str, object]:
    models = json.loads((run_dir / "test" / "results.json").read_text())["models"]
    return {name: {key: value for key, value in model.items() if key != "checkpoint"} for name, model in models.items()}
