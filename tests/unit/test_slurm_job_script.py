"""scripts/slurm/job.sh with stand-ins for SLURM, Ray and the stage: what a job starts, what follows its end, what is
left. The same on a real SLURM: tests/slurm.
"""

import os
import signal
import subprocess
import time

import pytest

from dgpo.slurm.options import parse_options
from dgpo.slurm.render import HOME, TEMPLATES, render

JOB = str(4_000_000 + os.getpid())
STAND_INS = {
    "scontrol": """
        case "$*" in
          "show hostnames"*) printf '%s\\n' $NODES ;;
          *"show node"*) echo "NodeName=$4 NodeAddr=10.0.0.${4#n} State=ALLOCATED" ;;
          requeue*) echo "requeued" >>"$FOLDER/events"; kill -TERM 0 ;;
        esac""",
    "squeue": """
        printf '7.0\\n7.batch\\n' """,
    "scancel": """
        echo "scancel $*" >>"$FOLDER/events"
        pkill -KILL -g 0 -f 'sleep 61' """,
    "srun": """
        while [[ "$1" == --* ]]; do shift; done
        ROCR_VISIBLE_DEVICES=0,1 HIP_VISIBLE_DEVICES=0,1 exec "$@" """,
    "ray": """
        echo "ray $*" >>"$FOLDER/events"
        env >>"$FOLDER/environments"
        exec sleep 60""",
    "python": """
        case "$*" in
          "-m dgpo.slurm.ready ports"*) for node in "${@:5}"; do echo 8123 >"$4/port-$node"; done ;;
          "-m dgpo.slurm.ready"*) exit "$READY" ;;
          "-m retriever.serve"*) echo "$*" >>"$FOLDER/events"; eval "$SERVER" ;;
          *) echo "${*:2}" >>"$FOLDER/events"; env >>"$FOLDER/environments"; eval "$STAGE" ;;
        esac""",
}


class Job:
    """A training whose work is a piece of bash; `events` is what it started, in order."""

    def __init__(
        self, folder, *arguments, stage="exit 0", nodes=1, restarts=0, ready=0, server="exec sleep 60", home=HOME
    ):
        self.folder = folder
        for name, text in STAND_INS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        run = ["hardware=cpu", f"run_dir={folder / 'run'}", f"hardware.num_nodes={nodes}"]
        served = ["retriever.url=http://elsewhere"] if "--retriever" not in arguments else []
        script = render(parse_options(["--stages=train", *run, *served, *arguments]), "train", home=home, folder=folder)
        names = [f"n{number}" for number in range(1, nodes + 1)]
        environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FOLDER": str(folder),
            "STAGE": stage,
            "SERVER": server,
        }
        environment |= {"NODES": " ".join(names), "READY": str(ready), "SLURM_JOB_ID": JOB, "SLURM_CPUS_ON_NODE": "2"}
        environment |= {"SLURM_JOB_NODELIST": ",".join(names), "SLURM_RESTART_COUNT": str(restarts)}
        self.process = subprocess.Popen(
            ["bash", "-c", script, "job"],
            env=environment
            | {"SLURM_ARRAY_TASK_ID": "1", "ROCR_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self):
        """The exit status and what the job said."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output

    def send(self, number):
        """To the script alone, as SLURM's `--signal=B:` does, once the stage runs."""
        deadline = time.monotonic() + 10
        while not any(event.startswith("dgpo train") for event in self.events):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)  # until the stage has set its trap
        self.process.send_signal(number)

    @property
    def events(self):
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []


def test_a_job_starts_servers_then_ray_then_the_stage_and_leaves_no_token(tmp_path):
    served = ("--retriever", "--index wiki=/indexes/wiki", "--retriever-nodes=2", "--seeds=5,6")
    job = Job(tmp_path, *served, "train.num_steps=3", nodes=2)
    code, output = job.end()
    assert code == 0, output
    run = tmp_path / "run" / "seed6"
    servers = [event for event in job.events if event.startswith("-m retriever.serve")]
    ray = [event for event in job.events if event.startswith("ray")]
    assert [f"--host 10.0.0.{n} --port 0" in server for n, server in enumerate(sorted(servers), 1)] == [True, True]
    assert all("--index wiki=/indexes/wiki" in server for server in servers)
    assert "--head --node-ip-address=10.0.0.1" in ray[0]
    port = 20000 + int(JOB) % 10000
    assert f"--address=10.0.0.1:{port} --node-ip-address=10.0.0.2" in ray[1]
    stage = job.events[-1]
    assert len(job.events) == len(servers) + len(ray) + 1 == 5
    assert stage.startswith("dgpo train hardware=cpu hardware.num_nodes=2 train.num_steps=3 seed=6 run_dir=" + str(run))
    assert "retriever.url='http://10.0.0.1:8123,http://10.0.0.2:8123'" in stage
    assert f"retriever.token_file={run}/slurm/job-{JOB}/retriever_token" in stage
    assert "resume" not in stage
    assert list((run / "slurm").iterdir()) == []


@pytest.mark.slow  # waits for it for five seconds
def test_a_step_that_takes_its_time_to_end_is_killed_and_the_script_lives_on(tmp_path):
    job = Job(tmp_path, "--retriever", "--index a=/a", ready=0, server="trap '' TERM; sleep 61")
    code, output = job.end()
    assert code == 0, output
    assert job.events[-1] == "scancel --signal=KILL 7.0"
    assert list((tmp_path / "run" / "slurm").iterdir()) == []


def test_gpus_are_named_to_nvidias_library_alone(tmp_path):
    assert Job(tmp_path, nodes=2).end()[0] == 0
    environments = (tmp_path / "environments").read_text()
    assert environments.count("CUDA_VISIBLE_DEVICES=0,1") == 3  # Ray's head, a worker, the stage
    assert "ROCR_VISIBLE_DEVICES" not in environments
    assert "HIP_VISIBLE_DEVICES" not in environments


def test_one_node_starts_no_ray(tmp_path):
    job = Job(tmp_path)
    assert job.end()[0] == 0
    assert [event.split()[0] for event in job.events] == ["dgpo"]


def test_the_warning_before_the_limit_reaches_the_stage_and_the_job_goes_back_into_the_queue(tmp_path):
    job = Job(tmp_path, stage="trap 'echo saved >>$FOLDER/events; exit 75' USR1; while true; do sleep 0.1; done")
    job.send(signal.SIGUSR1)
    _, output = job.end()
    assert job.events[1:] == ["saved", "requeued"]
    assert "the time limit is near: requeued" in output


def test_a_job_that_starts_again_resumes(tmp_path):
    job = Job(tmp_path, restarts=1)
    assert job.end()[0] == 0
    assert job.events[0].endswith(" resume=true")


def test_a_stage_that_does_not_react_to_the_warning_is_killed_in_time_to_be_requeued(tmp_path):
    script = (TEMPLATES / "job.sh").read_text().replace("RESERVE_S=60", "RESERVE_S=119")  # a second after the warning
    (tmp_path / "scripts" / "slurm").mkdir(parents=True)
    (tmp_path / "scripts" / "slurm" / "job.sh").write_text(script)
    job = Job(tmp_path, "--lead-s=120", stage="trap '' USR1; while true; do sleep 0.1; done", home=tmp_path)
    job.send(signal.SIGUSR1)
    job.end()
    assert job.events[1:] == ["requeued"]


def test_a_cancelled_job_asks_the_stage_to_stop_and_stays_away(tmp_path):
    job = Job(tmp_path, stage="trap 'echo asked >>$FOLDER/events; exit 75' TERM; while true; do sleep 0.1; done")
    job.send(signal.SIGTERM)
    assert job.end()[0] == 143
    assert job.events[1:] == ["asked"]


def test_a_failing_stage_has_as_many_attempts_as_were_asked_for(tmp_path):
    for restarts in range(3):
        job = Job(tmp_path, "--retries=2", stage="exit 1", restarts=restarts)
        job.end()
    assert job.events.count("requeued") == 2
    assert "start 2: the stage ended with status 1" in (tmp_path / "run" / "slurm" / "train.failures").read_text()


def test_a_wrong_configuration_ends_the_job_at_once(tmp_path):
    job = Job(tmp_path, stage="exit 2")
    assert job.end()[0] == 2
    assert "requeued" not in job.events


def test_a_server_that_does_not_become_ready_costs_an_attempt(tmp_path):
    job = Job(tmp_path, "--retriever", "--index a=/a", "--retries=0", ready=1)
    code, output = job.end()
    assert code == 1
    assert "retrieval server: not ready" in (tmp_path / "run" / "slurm" / "train.failures").read_text()
    assert "no attempt left" in output
