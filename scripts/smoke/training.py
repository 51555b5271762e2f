"""Step 5: `dgpo train` itself: two steps of the exact form, a third after a resume, and a step of the reward form."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from smoke.checks import Checks
from smoke.models import save_model

from dgpo.agent.protocol import build_messages
from dgpo.data.rows import write_rows

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"max_turns": 2, "max_prompt_tokens": 640, "max_response_tokens": 640, "max_turn_tokens": 96}
LIMITS |= {"max_passage_tokens": 64, "topk": 2, "min_turn_tokens": 16}


def run(checks: Checks, *, device: str, folder: Path) -> None:
    student = save_model("qwen2.5-0.5b", folder / "student", seed=0, device=device)
    teacher = save_model("qwen2.5-3b", folder / "teacher", seed=1, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()
    overrides = [*hardware(device), *inputs(device, folder), f"student.path={student}", f"teacher.path={teacher}"]
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0

    exact, reward = ([*overrides, *form(name, folder)] for name in ("exact", "reward"))
    first = _train(checks, "two steps of the exact form", [*exact, "train.num_steps=2"])
    checks.true("  two steps in metrics.jsonl", [step["step"] for step in first] == [1, 2])
    _finite(checks, first)
    third = _train(checks, "a third after a resume", [*exact, "train.num_steps=3", "resume=true"])
    checks.true("  it is the third", [step["step"] for step in third] == [1, 2, 3])
    _finite(checks, _train(checks, "a step of the reward form", [*reward, "train.num_steps=1"]))
    if device == "cuda":
        time.sleep(5)
        checks.below("GiB that stay taken afterwards", (free - torch.cuda.mem_get_info()[0]) / 2**30, 1)


def form(name: str, folder: Path) -> list[str]:
    """A run of its own for a form of the teacher term."""
    return [f"train.teacher_term.form={name}", f"run_dir={folder / name}"]


def hardware(device: str) -> list[str]:
    if device == "cpu":
        return ["hardware=cpu", "hardware.micro_batch_size=2"]
    settings = [
        "hardware=h200x8",
        "hardware.gpus_per_node=1",
        "hardware.engine.enforce_eager=true",
        "hardware.gpu=null",
    ]
    settings += ["hardware.num_agent_workers=2", "hardware.num_storage_units=1", "hardware.logical_cpus=16"]
    settings += ["hardware.engine.gpu_memory_utilization=0.3"]
    if importlib.util.find_spec("flash_attn") is None:
        settings += ["hardware.attention=sdpa", "hardware.remove_padding=false", "hardware.max_tokens_per_gpu=null"]
    return settings


def inputs(device: str, folder: Path) -> list[str]:
    """Questions, and passages for a search that runs inside the processes."""
    episodes = 32 if device == "cuda" else 4
    rows = [
        {
            "data_source": "smoke",
            "prompt": build_messages(f"What is the country of place {index}?"),
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["France"]}},
            "extra_info": {"id": f"smoke_{index}", "split": "train", "index": index},
        }
        for index in range(2 * episodes)
    ]
    write_rows(folder / "rows.parquet", rows)
    passages = [{"id": str(index), "contents": f'"Place {index}"\nPlace {index} is in France.'} for index in range(50)]
    (folder / "passages.jsonl").write_text("\n".join(map(json.dumps, passages)) + "\n")
    return [
        "stages=[train]",
        f"data.train_file={folder / 'rows.parquet'}",
        "retriever.backend=examples.jsonl_search:JsonlSearch",
        f"retriever.backend_options.path={folder / 'passages.jsonl'}",
        f"train.batch_size={episodes}",
        f"train.mini_batch_size={episodes // 2}",
        "train.save_every=1",
        "train.stability.measure_init_kl=true",
        *(f"episode.{name}={value}" for name, value in LIMITS.items()),
    ]


def _train(checks: Checks, what: str, overrides: list[str]) -> list[dict[str, float]]:
    """Runs the command. Returns what metrics.jsonl holds."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dgpo", "train", *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout[-2000:], result.stderr[-4000:], flush=True)
    last = (result.stderr.strip().splitlines() or [""])[-1]
    checks.true(
        what, result.returncode == 0, f"status {result.returncode}: {last[:200]}" if result.returncode else "done"
    )
    checks.number(f"{what}, s", time.perf_counter() - started)
    run_dir = next(each for each in overrides if each.startswith("run_dir=")).partition("=")[2]
    file = Path(run_dir) / "train" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _finite(checks: Checks, steps: list[dict[str, float]]) -> None:
    """The update's numbers, and how far the engine's log-probs are from the trainer's."""
    named = [step[name] for step in steps for name in step if name.startswith(("actor/", "critic/", "teacher/"))]
    checks.true("  all numbers of the updates are finite", named and all(map(math.isfinite, named)), len(named))
    for step in steps:
        for what, name, limit in (("largest", "max", 0.5), ("mean", "mean", 0.05)):
            difference = step[f"rollout/log_prob_diff_{name}"]
            checks.below(f"  log-probs of engine and trainer, {what} difference", difference, limit)
        if step["step"] == 1:
            checks.below("  KL to the initial policy at the first step", abs(step["actor/kl_to_init"]), 1e-3)
        checks.number("seconds of a step", step.get("timing_s/step", 0.0))
