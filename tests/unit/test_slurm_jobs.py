"""SLURM jobs as text: what is rendered, submitted and refused; and the bash that all of them share."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dgpo.errors import ConfigError
from dgpo.slurm.__main__ import describe, main
from dgpo.slurm.options import parse_options, seconds
from dgpo.slurm.render import render, submission

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm_train.sbatch"
SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
RUN = ["hardware=h200x8xN", "hardware.num_nodes=4", "run_dir=/shared/runs/dgpo", "pair=qwen3b_05b"]
SERVED = ["--retriever", "--index wiki=/shared/wiki18 --num-threads 32"]


def script(stage, *arguments):
    return render(parse_options([*SERVED, *RUN, *arguments]), stage, home=Path("/shared/dgpo"), folder=Path("/project"))


def test_a_rendered_script_is_the_recorded_one():
    options = ["--partition", "gpu", "--account", "lab", "--qos", "high", "--time", "8:00:00", "--seeds", "11,12"]
    options += ["--activate", "source /shared/dgpo/.venv/bin/activate", "--sbatch=--constraint=h200"]
    assert script("train", *options, "train.loggers=[console,wandb]") == GOLDEN.read_text()


def test_what_is_rendered_is_bash(tmp_path):
    for stage in ("collect", "distill", "train", "test"):
        text = script(stage, "--container", "apptainer exec --nv dgpo.sif")
        result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs the package shellcheck")
def test_the_scripts_are_clean_for_shellcheck():
    files = [str(path) for path in [*sorted(SCRIPTS.iterdir()), *sorted(SCRIPTS.parent.glob("*.sh"))]]
    command = ["shellcheck", "-x", "-P", "SCRIPTDIR", *files]
    root = SCRIPTS.parents[1]  # what "$DGPO_HOME/..." is looked up from
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stdout


def test_a_stage_on_fewer_nodes_is_told_so():
    text = script("test", "--nodes", "test=1")
    assert "#SBATCH --nodes=1\n" in text
    assert "  hardware.num_nodes=1" in text.partition("hardware.num_nodes=4")[2]
    assert "#SBATCH --nodes=4\n" in script("train", "--nodes", "test=1")


def test_values_with_blanks_are_quoted_as_sbatch_reads_them(monkeypatch, tmp_path):
    text = script("train", "--account", "our lab", "--sbatch=--comment=run #3", "--sbatch=--reservation=a,b[1-2]=c")
    assert '#SBATCH --account="our lab"\n' in text
    assert '#SBATCH --comment="run #3"\n' in text
    assert "#SBATCH --reservation=a,b[1-2]=c\n" in text
    (tmp_path / "größe 1").mkdir()
    monkeypatch.chdir(tmp_path / "größe 1")
    options = parse_options([*SERVED, *RUN])
    assert f'#SBATCH --chdir="{tmp_path / "größe 1"}"\n' in render(options, "train")


def test_a_cluster_without_gpus_is_asked_for_none():
    options = parse_options(["--stages=distill", "hardware=cpu", "world=tiny", "hardware.num_nodes=2"])
    text = render(options, "distill")
    assert "--gpus" not in text
    assert "export DGPO_GPUS=1\n" in text
    assert "export DGPO_CPUS=32\n" in text


def test_only_stages_that_search_start_servers():
    assert "DGPO_RETRIEVER=" in script("collect")
    assert "DGPO_RETRIEVER" not in script("distill")
    assert "DGPO_RETRIEVER=" in script("distill", "distill.loss=distillm")


def test_the_run_tests_its_own_last_model_unless_others_are_named():
    assert "'test.models.dgpo={run_dir}/train/model'" in script("test")
    assert "'test.models.kd={run_dir}/distill/model'" in script("test", "experiment=kd")
    assert "{run_dir}" not in script("test", "test.models.mine=/shared/mine")
    assert "'test.models.own={run_dir}/distill/model'" in script("test", "test.models.own={run_dir}/distill/model")


def test_stages_are_chained_and_arrays_task_by_task(tmp_path):
    text = describe(parse_options([*SERVED, *RUN]))
    commands = [line for line in text.splitlines() if line.startswith("$")]
    assert [command.rpartition("/")[2] for command in commands] == [
        "collect.sbatch", "distill.sbatch", "train.sbatch", "test.sbatch"
    ]  # fmt: skip
    assert "--dependency" not in commands[0]
    assert "--dependency=afterok:<job of collect> --kill-on-invalid-dep=yes" in commands[1]
    assert "--dependency=aftercorr:7" in submission(tmp_path, "7", array=True)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("10:30", 630), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-01:00:05", 176405)],
)
def test_slurms_forms_of_time(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "collect,tain"], "unknown stage 'tain', expected some of collect, distill, train, test"),
        (["--stages", "train,train"], "each at most once"),
        (["--time", "train=5", "--lead-s", "600"], "--time 5 for train is not longer than --lead-s 600"),
        (["--time", "tran=5"], "'tran' is none of the stages"),
        (["--time", "soon"], "expected minutes, HH:MM:SS"),
        (["--lead-s", "60"], "--lead-s 60: expected 120 to 65535"),
        (["--nodes", "8"], "--nodes 8 for collect: expected 1 to hardware.num_nodes=4"),
        (["--seeds", "1,1"], "expected different whole numbers"),
        (["--seeds", "1,2", "seed=3"], "leave one of them out"),
        (["retriever.url=http://node0:8000"], "--retriever starts servers, and retriever.url=http://node0:8000 names"),
        (["--retriever-nodes", "3", "--nodes", "test=2"], "--retriever-nodes 3: expected 1 to 2"),
        (["--retriever", "--index 'a"], "No closing quotation"),
        (["--sbatch=-C=h200"], "expected a long flag"),
        (["--sbatch=--"], "--sbatch=--: expected a value"),
        (["--time=--"], "--time=--: expected a value"),
        (["--retries", "-1"], "--retries -1: expected at least 0"),
        (["--node-tmp", "/scratch/of/somebody/very/long"], "at most 25 characters"),
        (["run_dir=/shared/my runs"], "use letters, digits"),
        (["dry_run=true"], "--dry-run prints the jobs"),
        (["train.num_step=3"], "did you mean train.num_steps"),
        (["collect"], "'collect' is neither an option nor key=value"),
        (["--partition", "gpu\n#SBATCH --nodes=9"], "--partition 'gpu\\n#SBATCH --nodes=9': a line for sbatch holds"),
        (["--account", "la'b"], '--account "la\'b": a line for sbatch holds'),
        (["--sbatch=--comment=a\\b"], "--comment 'a\\\\b': a line for sbatch holds"),
        (["--container", "apptainer exec --bind '/a b' x.sif"], "is cut at its blanks"),
        (["--retriever", "--index a=b\n--port 1"], "expected one line"),
        (["train.algorithm=foo"], "train.algorithm=foo"),
        (["--nodes", "train=3"], "train.batch_size=512 is not a multiple of GPUs=24"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(arguments, message, capsys):
    assert main([*SERVED, *RUN, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_stages_that_search_need_a_retriever(capsys):
    with pytest.raises(ConfigError, match="collect, train, test search: add --retriever"):
        parse_options(RUN)
    parse_options([*RUN, "retriever.url=http://node0:8000"])
    parse_options([*RUN, "--stages", "distill"])


@pytest.fixture
def nothing_missing(monkeypatch):
    monkeypatch.setattr("dgpo.slurm.__main__.missing_inputs", lambda _: [])


def test_what_the_jobs_would_miss_is_said_before_they_wait_in_the_queue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dgpo.config.model_files.hub_answers", lambda: False)
    (tmp_path / "train.parquet").touch()
    wanted = [f"data.train_file={tmp_path / 'train.parquet'}", f"teacher.path={tmp_path / 'teacher'}"]
    for more in ([], ["--dry-run"]):
        assert main([*SERVED, *RUN, *wanted, *more]) == 2
        captured = capsys.readouterr()
        assert ("#SBATCH" in captured.out) is bool(more)
        assert captured.err.count("\n") == 1
        assert "data.collect_file is not set, and collect reads it" in captured.err
        assert "data.test_files is empty" in captured.err
        assert "the index /shared/wiki18 does not exist" in captured.err
        assert f"teacher.path={tmp_path / 'teacher'}: no such folder" in captured.err
        assert "student.path=Qwen/Qwen2.5-0.5B-Instruct: neither a folder nor in the cache" in captured.err
        assert "data.train_file" not in captured.err


@pytest.mark.parametrize(
    ("model", "stages", "is_missing"),
    [
        ("/nowhere/model", "train,test", True),
        ("{run_dir}/train/model", "train,test", False),
        ("{run_dir}/train/models/best", "train,test", False),
        ("{run_dir}/train/model", "test", True),
    ],
)
def test_a_tested_model_is_there_or_a_job_before_writes_it(model, stages, is_missing, tmp_path, capsys):
    run = [f"run_dir={tmp_path}", "experiment=ppo", f"test.models.own={model}"]
    assert main([*SERVED, *run, "--stages", stages, "--dry-run"]) == 2
    said = f"test.models.own={model.format(run_dir=tmp_path)}: no such folder" in capsys.readouterr().err
    assert said is is_missing


def test_jobs_are_submitted_in_order_and_cancelled_when_one_is_refused(tmp_path, monkeypatch, capsys, nothing_missing):
    """With an sbatch that knows two jobs and refuses the third."""
    log = tmp_path / "log"
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >>{log}\ncount=$(wc -l <{log})\n[ $count -lt 3 ] || {{ echo no quota >&2; exit 1; }}\n'
        "echo 10$count\n"
    )
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho cancel "$@" >>{log}\n')
    for name in ("sbatch", "scancel"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = tmp_path / "run"
    assert main([*SERVED, *RUN, f"run_dir={run}"]) == 1
    assert "no quota" in capsys.readouterr().err
    lines = log.read_text().splitlines()
    assert lines[0] == f"--parsable {run}/slurm/collect.sbatch"
    assert lines[1] == f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {run}/slurm/distill.sbatch"
    assert lines[3] == "cancel 101 102"


def test_without_slurm_the_way_out_is_named(tmp_path, monkeypatch, capsys, nothing_missing):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*SERVED, *RUN, f"run_dir={tmp_path / 'run'}"]) == 1
    assert "print the scripts with --dry-run" in capsys.readouterr().err
