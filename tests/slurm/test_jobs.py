"""What follows the end of a stage, on a real SLURM of two nodes: a stand-in for the stage, everything else as it is."""

import sys
from pathlib import Path

import pytest

from dgpo.slurm.options import parse_options
from dgpo.slurm.render import render
from tests.conftest import ROOT
from tests.slurm.cluster import Slurm, slurm_cluster, why_not

pytestmark = pytest.mark.slow

# Stands where `--container` puts a command before every other: it plays the stage, and lets all else through.
STAND_IN = """#!{bash}
case "$*" in
  "python -m dgpo train"*) ;;
  *) exec "$@" ;;
esac
echo "$*" >>{folder}/starts
number=$(wc -l <{folder}/starts)
{stage}
"""
SAVES_WHEN_ASKED = """
[ "$number" -eq 1 ] || exit 0
trap 'echo saved >>{folder}/events; exit 75' USR1
while true; do sleep 0.2; done
"""
LOSES_A_NODE = """
[ "$number" -eq 1 ] || exit 0
while true; do sleep 0.2; done
"""


@pytest.fixture(scope="module")
def slurm():
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with slurm_cluster() as cluster:
        yield cluster


def submit(slurm: Slurm, folder: Path, stage: str, *arguments: str) -> str:
    """Submits a training whose stage is that piece of bash. Returns the job's number."""
    stand_in = folder / "stand_in"
    text = STAND_IN.format(bash="/bin/bash", folder=folder, stage=stage.format(folder=folder))
    stand_in.write_text(text)
    stand_in.chmod(0o755)
    options = parse_options(
        [
            *("hardware=cpu", "world=tiny", "hardware.num_nodes=2", f"run_dir={folder / 'run'}"),
            *("retriever.url=http://nowhere", "--stages=train", f"--container={stand_in}"),
            *(f"--node-tmp={slurm.local}", f"--activate=export PATH={Path(sys.executable).parent}:$PATH"),
            *arguments,
        ]
    )
    (folder / "run" / "logs").mkdir(parents=True)
    script = folder / "train.sbatch"
    script.write_text(render(options, "train", folder=ROOT))
    return slurm.run("sbatch", "--parsable", str(script))


def log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "run" / "logs").glob("*.log")))


def test_a_stage_is_warned_before_the_limit_saves_and_resumes_in_the_next_turn(slurm, tmp_path):
    number = submit(slurm, tmp_path, SAVES_WHEN_ASKED, "--time=3", "--lead-s=120")
    job = slurm.wait(number, "COMPLETED", timeout_s=300)
    starts = (tmp_path / "starts").read_text().splitlines()
    assert job["Restarts"] == "1", log(tmp_path)
    assert (tmp_path / "events").read_text() == "saved\n"
    assert [start.endswith("resume=true") for start in starts] == [False, True]
    assert list((tmp_path / "run" / "slurm").iterdir()) == []  # no token is left
    assert [path for name in ("n1", "n2") for path in (slurm.base / f"local.{name}").rglob("*")] == []


def test_a_failing_stage_is_tried_again_and_then_given_up(slurm, tmp_path):
    number = submit(slurm, tmp_path, "exit 1", "--retries=1")
    job = slurm.wait(number, "FAILED", timeout_s=200)
    assert job["Restarts"] == "1"
    assert job["ExitCode"] == "1:0"
    assert len((tmp_path / "run" / "slurm" / "train.failures").read_text().splitlines()) == 2
    assert "no attempt left" in log(tmp_path)


def test_a_wrong_configuration_is_not_tried_again(slurm, tmp_path):
    job = slurm.wait(submit(slurm, tmp_path, "exit 2"), "FAILED", timeout_s=120)
    assert (job["Restarts"], job["ExitCode"]) == ("0", "2:0")


def test_a_cancelled_job_asks_its_stage_to_stop_and_does_not_come_back(slurm, tmp_path):
    stage = "trap 'echo asked >{folder}/events; exit 75' TERM; while true; do sleep 0.2; done"
    number = submit(slurm, tmp_path, stage)
    slurm.wait_until(lambda: (tmp_path / "starts").exists(), timeout_s=60)
    slurm.run("scancel", number)
    slurm.wait(number, "CANCELLED", timeout_s=60)
    assert (tmp_path / "events").read_text() == "asked\n"


def test_a_lost_node_puts_the_job_back_into_the_queue(slurm, tmp_path):
    number = submit(slurm, tmp_path, LOSES_A_NODE)
    slurm.wait_until(lambda: (tmp_path / "starts").exists(), timeout_s=60)
    slurm.kill_node("n2")
    slurm.wait_until(lambda: slurm.job(number)["Restarts"] == "1", timeout_s=120)
    slurm.start_node("n2")
    slurm.wait(number, "COMPLETED", timeout_s=200)
    assert (tmp_path / "starts").read_text().splitlines()[1].endswith("resume=true")
