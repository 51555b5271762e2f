"""The real trainer, engine, Ray and retrieval server on the CPU, through the command that users run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo.engines.environment import DEFAULTS
from dgpo.rl.train import VERL_ENVIRONMENT
from dgpo.runs.artifacts import MANIFEST
from dgpo.tinyworld.tokenizer import TAGS
from tests.conftest import ROOT, TinyWorld, read_metrics, retriever_process, run_command
from tests.engine.killing import has_step, start_and_kill
from tests.engine.same_run import assert_same_run, repeatable

pytestmark = pytest.mark.engine

SMALL = [
    "train.batch_size=16",
    "train.mini_batch_size=8",
    "hardware.micro_batch_size=8",
    "train.num_steps=4",
    "train.save_every=2",
]

# One episode at a time; and a tolerance that rounding exceeds, so that the rollout's log-probs are never reused.
REPEATABLE = ["train.generation_concurrency=1", "train.reuse_log_probs_within=1e-9"]


@pytest.fixture(scope="module")
def straight_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of the exact form with one episode at a time, never interrupted."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = run_command("-m", "dgpo", "train", *tiny_world.overrides(run_dir), *SMALL, *REPEATABLE)
    assert result.returncode == 0, result.stderr[-3000:]
    (run_dir / "terminal.txt").write_text(result.stdout + result.stderr)
    return run_dir / "train"


def test_the_terminal_has_a_line_per_step_and_the_log_the_rest(straight_run: Path):
    terminal = (straight_run.parent / "terminal.txt").read_text()
    lines = terminal.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    shape = r"step (\d)/4   EM [01]\.\d{3}   KL -?\d+\.\d{3}   \d+\.\d s   (?:done|\d+ (?:s|min) left)"
    assert [int(re.fullmatch(shape, line)[1]) for line in steps] == [1, 2, 3, 4]
    assert len(lines) - len(steps) <= 40, terminal  # 60 lines for 20 steps
    assert f"model in {straight_run / 'model'}; next: python -m dgpo test" in terminal
    assert len((straight_run / "log.txt").read_text().splitlines()) > 100


def test_a_few_steps_of_the_exact_form(straight_run: Path):
    metrics = read_metrics(straight_run / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert any(0 < record["teacher/gate_fraction"] < 1 for record in metrics), "gated and ungated episodes must occur"
    for record in metrics:
        # The student failed on gate_fraction of 16; the teacher scored only the monitored ones apart from the loss.
        num_failed = round(16 * record["teacher/gate_fraction"])
        assert record["teacher/num_scored"] == record["teacher/num_monitored"]
        assert record["teacher/num_scored"] == min(8, num_failed) + min(8, 16 - num_failed)
        assert record["actor/teacher_loss"] > 0
        assert 0 < record["episode/trained_token_share"] < 1
    assert sum(record["episode/num_searches"] for record in metrics) > 0


def test_a_sample_of_the_episodes_is_logged_with_both_log_probs(straight_run: Path):
    lines = (straight_run / "episodes" / "step_1.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert 0 < len(records) <= 8
    assert not (straight_run / "episodes" / "step_2.jsonl").exists()
    assert (straight_run / "episodes" / "tokenizer.json").exists()
    for record in records:
        length = len(record["response_ids"])
        assert len(record["response_mask"]) == len(record["student_log_probs"]) == length
        assert record["question"]
        assert record["golds"]
        assert len(record["teacher_log_probs"]) == length  # monitored, right or wrong: the loss keeps no log-probs
    assert {record["em"] for record in records} == {0.0, 1.0}


def with_special_tags(model: Path, out: Path) -> Path:
    """A copy of the model whose tokenizer holds the tags as special tokens, as some published ones do."""
    shutil.copytree(model, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tags = [token for token in tokenizer["added_tokens"] if token["content"] in TAGS]
    assert len(tags) == len(TAGS)
    for token in tags:
        token["special"] = True
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / MANIFEST).unlink(missing_ok=True)  # it seals the folder as it was
    return out


def test_tags_that_are_special_tokens_end_turns_as_plain_ones_do(
    tiny_world: TinyWorld, straight_run: Path, tmp_path: Path
):
    student = with_special_tags(tiny_world.student, tmp_path / "student")
    teacher = with_special_tags(tiny_world.folder / "models" / "teacher", tmp_path / "teacher")
    arguments = [*tiny_world.overrides(tmp_path / "run"), *SMALL, *REPEATABLE, "train.num_steps=1"]
    result = run_command("-m", "dgpo", "train", *arguments, f"train.init={student}", f"teacher.path={teacher}")
    assert result.returncode == 0, result.stderr[-3000:]
    (record,) = read_metrics(tmp_path / "run" / "train" / "metrics.jsonl")
    plain = read_metrics(straight_run / "metrics.jsonl")[0]
    episodes = {name: value for name, value in plain.items() if name.startswith("episode/")}
    assert episodes["episode/truncated_turn_share"] == 0
    assert {name: record[name] for name in episodes} == episodes


def test_other_peoples_surroundings_and_columns_change_nothing(
    tiny_world: TinyWorld, straight_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hidden GPUs, a proxy that leads nowhere, a Turkish locale, and columns that mean something to veRL."""
    rows = pq.read_table(tiny_world.folder / "data" / "train.parquet").to_pylist()
    for row in rows:
        row |= {"agent_name": "tool_agent", "tools_kwargs": {"search": {"create_kwargs": {"x": 1}}}, "session_id": 7}
        row["extra_info"] |= {"need_tools_kwargs": True, "interaction_kwargs": {"name": "gsm8k"}, "split": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "foreign.parquet")
    nowhere = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", **nowhere}.items():
        monkeypatch.setenv(name, value)
    arguments = [*tiny_world.overrides(tmp_path / "run"), *SMALL, *REPEATABLE, "train.num_steps=1"]
    result = run_command("-m", "dgpo", "train", *arguments, f"data.train_file={tmp_path / 'foreign.parquet'}")
    assert result.returncode == 0, result.stderr[-3000:]
    (record,), plain = repeatable(tmp_path / "run" / "train"), repeatable(straight_run)[0]
    decided = [name for name in plain if name.startswith(("episode/", "teacher/", "actor/", "response_length/"))]
    assert {name: record[name] for name in decided} == {name: plain[name] for name in decided}


def test_trained_tokens_are_the_sampled_ones(straight_run: Path):
    """The trainer's log-probs of the batch are vLLM's of what it sampled: same ids, same positions, same weights."""
    for record in read_metrics(straight_run / "metrics.jsonl"):
        assert record["rollout/log_prob_diff_max"] < 1e-3
        assert record["rollout/log_probs_reused"] == 0.0


def test_the_final_checkpoint_is_a_hugging_face_folder_with_stop_strings(straight_run: Path):
    generation = json.loads((straight_run / "model" / "generation_config.json").read_text())
    assert generation["stop_strings"] == ["</search>", "</answer>"]
    assert (straight_run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_a_run_killed_and_resumed_equals_the_straight_run(
    tiny_world: TinyWorld, straight_run: Path, tmp_path_factory: pytest.TempPathFactory
):
    """To the last bit; test_resume.py does so at random points, with everything that has a state."""
    folder = tmp_path_factory.mktemp("killed") / "run" / "train"
    arguments = ["train", *tiny_world.overrides(folder.parent), *SMALL, *REPEATABLE]
    start_and_kill(arguments, folder.parent.with_name("log"), has_step(folder / "metrics.jsonl", 3))
    result = run_command("-m", "dgpo", *arguments, "resume=true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "continues from" in result.stderr
    assert_same_run(folder, straight_run)


def test_ray_gets_the_variables_that_verl_expects():
    """Those that matter without AMD's and Huawei's accelerators, and that no other part of the project decides."""
    script = (
        "import json; from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV as e; print(json.dumps(e['env_vars']))"
    )
    expected = json.loads(run_command("-c", script).stdout.splitlines()[-1])
    others = {"TOKENIZERS_PARALLELISM", "VLLM_LOGGING_LEVEL"}
    given = {**DEFAULTS, **VERL_ENVIRONMENT}
    given = {name: value for name, value in given.items() if name not in others}
    assert {
        name: value for name, value in expected.items() if not name.startswith(("HCCL_", "HSA_")) and name not in others
    } == {name: value for name, value in given.items() if name in expected}
    assert VERL_ENVIRONMENT.keys() - expected.keys() == {"TRANSFER_QUEUE_ENABLE"}


def test_a_retriever_killed_in_mid_run_stops_it_resumably(
    tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory
):
    """Also the `reward` form: until the retriever dies, the teacher scores the failed episodes and the sample only.

    And the rollout's log-probs are reused: only those of a sample are computed again.
    """
    run_dir = tmp_path_factory.mktemp("outage") / "run"
    metrics_path = run_dir / "train" / "metrics.jsonl"
    with retriever_process(tiny_world.indexes, run_dir.with_name("port")) as (retriever, url):
        arguments = [
            *tiny_world.overrides(run_dir, url),
            *SMALL,
            "train.num_steps=200",
            "train.save_every=100",
            "train.teacher_term.form=reward",
            "train.init_kl_coef=0.001",
            "train.reuse_log_probs_within=0.001",
            "retriever.max_retries=1",
            "retriever.max_outage_s=0",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "dgpo", "train", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        _wait_for_step(process, metrics_path, step=2)
        os.kill(retriever.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    last = stderr.strip().splitlines()[-1]
    assert "lost a search" in last
    assert "resume=true" in last
    metrics = read_metrics(metrics_path)
    saved = (run_dir / "train" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert int(saved) == metrics[-1]["step"]
    for record in metrics:
        num_failed = round(16 * record["teacher/gate_fraction"])
        assert record["teacher/num_scored"] == num_failed + record["teacher/num_monitored"]
        assert record["rollout/log_probs_reused"] == 1.0
        assert 0 < record["rollout/log_prob_diff_max"] < 1e-3


def _wait_for_step(process: subprocess.Popen[str], metrics_path: Path, *, step: int, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while len(read_metrics(metrics_path)) < step:
        assert process.poll() is None, "training ended early"
        assert time.monotonic() < deadline, f"no step {step} within {timeout_s} s"
        time.sleep(0.1)
