"""A real student and a real teacher through every stage on a CPU: seconds, peak memory against the plan, log-probs.

    python scripts/bench/real_pair.py FOLDER --student models/qwen0.5b --teacher models/qwen1.5b [--out runs/real-pair]
        [--dry-run] [key=value ...]

FOLDER is one for `dgpo own`; own_folder.py makes one of public sets. It is about the plumbing: a few questions and
steps say nothing of exact match. The units, each a command of `dgpo`:

| unit | what runs |
|---|---|
| collect | the teacher, 40 questions |
| oracle | scripted demonstrations on 40 questions, from which the cold start learns: the teacher is untrained too |
| distill | the cold start by full-vocabulary KL from the teacher, with adapters, four steps |
| reward, token, exact | GRPO in each form of the teacher term: three steps of 4 questions, two samples each |
| resume | one more step of the last of these |
| ppo | one step with a critic, where the plan fits into this machine's memory |
| test | the student before, after the cold start and after RL, 8 questions of each set |
| export | the model with its card |

A unit that is finished (`units.json`) is not run again; one that was cut is made anew. Further overrides are those of
`dgpo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from real_memory import COMMON, MOST_FRUGAL, SHORT, plan

from dgpo.algorithms.selective_kl import TEACHER_FORMS
from dgpo.config.load import load_config
from dgpo.data.own import prepare_own
from dgpo.errors import DgpoError
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.machine import memory_limit
from dgpo.pipeline.own import sized_for_cpu, test_files
from dgpo.pipeline.processes import PeakMemory, Stages, python_module, retrieval_server
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.stopping import stopped_by_sigterm

TEST_QUESTIONS = 8
UNPLANNED = ("oracle", "export")  # no model plays there, though the plan of `collect` counts one
# Metrics of RL -> their name here, and how the steps are put together
SHOWN: dict[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "rollout/log_prob_diff_mean": ("log-prob difference, mean", mean),
    "rollout/log_prob_diff_max": ("largest", max),
    "teacher/kl_failed": ("KL to the teacher, failed", mean),
    "timing_s/step": ("s a step", mean),
}


def units(folder: Path, student: Path) -> dict[str, tuple[str, list[str]]]:
    """Name -> (stage, overrides)."""
    cold_start, last = folder / "distill" / "model", list(TEACHER_FORMS)[-1]
    grpo = [
        *(f"train.init={cold_start}", "train.batch_size=4", "train.samples_per_question=2", "train.mini_batch_size=8"),
        *("train.save_every=3", "train.keep_last=1", "train.validate_every=0", "train.teacher_term.num_monitored=2"),
        "hardware.gradient_checkpointing=true",
    ]
    ppo = [*grpo, "experiment=dgpo", "train.batch_size=8", "train.samples_per_question=1", "train.num_steps=1"]
    tested = {"before": student, "kd": cold_start, "dgpo": folder / last / "train" / "model"}
    found = {
        "collect": ("collect", ["collect.source=teacher", "collect.max_questions=40"]),
        "oracle": ("collect", ["collect.max_questions=40", f"run_dir={folder / 'oracle'}"]),
        "distill": (
            "distill",
            [
                *(f"distill.episodes={folder / 'oracle' / 'collect'}", "experiment=kd", "distill.lora_rank=16"),
                *("distill.learning_rate=1e-3", "distill.max_steps=4", "distill.micro_batch_size=1"),
                *("distill.held_out_share=0", "hardware.gradient_checkpointing=true"),
            ],
        ),
    }
    for form in TEACHER_FORMS:
        own = ["experiment=dgpo_grpo", f"train.teacher_term.form={form}", f"run_dir={folder / form}"]
        found[form] = ("train", [*grpo, *own, "train.num_steps=3"])
        if form == last:
            found["resume"] = ("train", [*grpo, *own, "train.num_steps=4"])
    found["ppo"] = ("train", [*ppo, "train.teacher_term.form=exact", f"run_dir={folder / 'ppo'}"])
    models = [f"test.models.{name}={path}" for name, path in tested.items()]
    found["test"] = ("test", [*models, f"test.max_questions={TEST_QUESTIONS}", "test.baseline=before"])
    found["export"] = ("export", [f"export.out={folder / 'export'}", f"run_dir={folder / last}"])
    return found


def facts(folder: Path, name: str) -> dict[str, Any]:
    """What a finished unit left, beside its seconds and its memory."""
    if name in ("collect", "oracle"):
        stage = folder / "collect" if name == "collect" else folder / "oracle" / "collect"
        return dict(json.loads((stage / MANIFEST).read_text())["counts"])
    if name == "test":
        results = json.loads((folder / "test" / "results.json").read_text())["models"]
        return {model: f"{row['average']['answered']:.0%} answered" for model, row in results.items()}
    if name == "distill":
        return {"loss": [round(record["loss"], 4) for record in read_jsonl(folder / "distill" / "metrics.jsonl")]}
    run = folder / (list(TEACHER_FORMS)[-1] if name == "resume" else name)
    records = read_jsonl(run / "train" / "metrics.jsonl")[-1 if name == "resume" else 0 :]
    found = {
        label: over(record[key] for record in records)
        for key, (label, over) in SHOWN.items()
        if all(key in record for record in records)
    }
    return {"steps": len(records), **found}


def render(done: dict[str, dict[str, Any]]) -> str:
    lines = ["| unit | s | peak, GiB | of the plan | |", "|---|---|---|---|---|"]
    for name, unit in done.items():
        told = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in unit["facts"].items()
        )
        share = f"{unit['peak'] / unit['plan']:.2f}" if unit.get("peak") and unit.get("plan") else "-"
        peak = f"{unit['peak']:.2f}" if unit.get("peak") else "-"
        seconds = f"{unit['seconds']:.0f}" if unit.get("seconds") else "-"
        lines.append(f"| {name} | {seconds} | {peak} | {share} | {told} |")
    return "\n".join(lines) + "\n"


def run_unit(stages: Stages, folder: Path, name: str, stage: str, overrides: list[str]) -> dict[str, Any]:
    run_dir = Path(load_config(overrides).run_dir)
    planned = 0 if name in UNPLANNED else plan(stage, overrides)
    if name == "ppo" and planned > memory_limit():
        left_out = f"left out: {planned / GIB:.1f} GiB planned, {memory_limit() / GIB:.1f} here"
        return {"plan": planned / GIB, "facts": {"": left_out}}
    if name == "resume":
        overrides = [*overrides, "resume=true"]
    else:
        shutil.rmtree(run_dir / stage, ignore_errors=True)
    with PeakMemory() as memory:
        try:
            stages.run(**{name: [*python_module("dgpo"), stage, *overrides]})
        except DgpoError:
            if name != "collect" or not kept_nothing(folder):
                raise
    found = {} if name == "export" else facts(folder, name)
    return {"seconds": stages.wall_s[name], "peak": memory.peak_bytes / GIB, "plan": planned / GIB, "facts": found}


def kept_nothing(folder: Path) -> bool:
    """Whether the collection ended, and with no correct episode: a finding about an untrained teacher, and no fault."""
    return (folder / "collect" / MANIFEST).exists() and not facts(folder, "collect")["kept"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real-pair"))
    parser.add_argument("--dry-run", action="store_true", help="the plans alone")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    folder = options.out.resolve()
    data = folder / "data"
    common = [
        *(*COMMON, *sized_for_cpu(), *SHORT, *MOST_FRUGAL, f"student.path={options.student.resolve()}"),
        *(f"teacher.path={options.teacher.resolve()}", f"run_dir={folder}", f"data.train_file={data}/train.parquet"),
        f"data.collect_file={data}/train.parquet",
    ]
    if not data.exists():
        prepare_own(options.source, data, config=load_config([*common, *options.overrides]))
    common += [f"data.test_files.{file.name.removesuffix('_test.parquet')}={file}" for file in test_files(folder)]
    planned = {
        name: (stage, [*common, *own, *options.overrides])
        for name, (stage, own) in units(folder, options.student.resolve()).items()
    }
    if options.dry_run:
        for name, (stage, overrides) in planned.items():
            if name not in UNPLANNED:
                print(f"== {name}")
                plan(stage, overrides)
        return
    stages = Stages(folder, report_every_s=60, way_on="the same command continues")
    index = folder / "indexes" / "own"
    if not index.exists():
        corpus = ["--corpus", str(data / "corpus.jsonl"), "--out", str(index), "--method", "bm25"]
        stages.run(index=[*python_module("retriever.build"), *corpus])
    path = folder / "units.json"
    done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    with retrieval_server(stages, folder / "indexes", default="own") as url:
        for name, (stage, overrides) in planned.items():
            if name not in done:
                done[name] = run_unit(stages, folder, name, stage, [*overrides, f"retriever.url={url}"])
                atomic_write_text(path, json.dumps(done, indent=1) + "\n")
    text = render(done)
    atomic_write_text(folder / "units.md", text)
    print(text)


if __name__ == "__main__":
    with stopped_by_sigterm():
        main()
