"""Peak memory of real models on a CPU against the plan: proportional (PSS), over all processes, retriever included.

    python scripts/bench/real_memory.py ppo --student models/smollm2
    python scripts/bench/real_memory.py distill --student models/qwen0.5b --teacher models/qwen1.5b
    python scripts/bench/real_memory.py grpo --student models/qwen0.5b [--dry-run] [key=value ...]

| case | what runs |
|---|---|
| ppo | one step of RL with a critic and the exact form, 8 episodes; the teacher is a twin of the student by default |
| grpo | one step of RL without teacher and critic, 8 episodes of at most 800 tokens |
| distill | two steps of the cold start by full-vocabulary KL from the teacher, with adapters |

Documents are the project's own pages, questions ask which page has a section, and demonstrations are the script's. What
was made before in `--folder` is used again; the measured stage is made anew. Further overrides are those of `dgpo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from dgpo.config.load import load_config
from dgpo.data.own import prepare_own
from dgpo.hardware.known_gpus import GIB
from dgpo.hardware.stages import stage_budget, stage_models
from dgpo.pipeline.own import sized_for_cpu
from dgpo.pipeline.processes import PeakMemory, Stages, python_module, retrieval_server
from dgpo.runs.stopping import stopped_by_sigterm

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("world=own", "hardware=cpu")
SHORT = ("episode.max_prompt_tokens=300", "episode.max_response_tokens=500", "episode.max_turn_tokens=80")
# Micro-batches of one longest episode, and few of glibc's arenas, each of which keeps what was freed in it
FRUGAL = ("hardware.max_tokens_per_gpu=1536", 'hardware.env.MALLOC_ARENA_MAX="2"')
# Blocks from 1 MB on go back to the system; the engine in bfloat16, with 96 blocks of 128 tokens for its 8 episodes
MOST_FRUGAL = (
    *FRUGAL,
    *('hardware.env.MALLOC_MMAP_THRESHOLD_="1048576"', "hardware.engine.dtype=bfloat16"),
    *("hardware.engine.max_num_seqs=8", "hardware.engine.max_num_batched_tokens=1024"),
    "hardware.verl.actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=96",
)
CASES = {  # name -> the measured stage, and its settings
    "ppo": (
        "train",
        (
            *("experiment=dgpo", "train.teacher_term.form=exact", "train.batch_size=8", "train.num_steps=1"),
            *("hardware.gradient_checkpointing=true", *FRUGAL),
        ),
    ),
    "grpo": (
        "train",
        (
            *("experiment=grpo", "train.init_kl_coef=0", "train.batch_size=2", "train.samples_per_question=4"),
            *("train.num_steps=1", "hardware.gradient_checkpointing=true", *SHORT, *MOST_FRUGAL),
        ),
    ),
    "distill": (
        "distill",
        (
            *("experiment=kd", "distill.loss=kd", "distill.lora_rank=16", "distill.max_steps=2"),
            *("distill.micro_batch_size=1", "distill.held_out_share=0", "hardware.gradient_checkpointing=true"),
        ),
    ),
}


def write_source(folder: Path) -> None:
    """The pages, and a question for each of their sections."""
    folder.mkdir(parents=True)
    questions = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        shutil.copy(page, folder)
        titles = [line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("## ")]
        title = page.read_text().splitlines()[0].lstrip("# ")
        questions += [{"question": f"Which page explains: {name}?", "answers": [title]} for name in titles]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def twin(student: Path, folder: Path) -> Path:
    """The student with a thousandth more in one tensor: as large, and another model."""
    from safetensors.torch import load_file, save_file

    if not folder.exists():
        shutil.copytree(student, folder)
        weights = load_file(folder / "model.safetensors")
        weights[min(weights)] *= 1.001
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plan(stage: str, overrides: list[str]) -> int:
    """The bytes that the plan of a stage comes to, which it prints by part."""
    config = load_config(overrides)
    models, unknown = stage_models(config, stage)
    if models is None:
        sys.exit(f"no plan: the shape of {', '.join(unknown)} is not known")
    budget = stage_budget(config, stage, models)
    phase, planned = budget.peak
    total = planned + sum(budget.host.values())
    print(f"plan: {total / GIB:.2f} GiB ({phase} {planned / GIB:.2f}, beside it {sum(budget.host.values()) / GIB:.2f})")
    for part, size in sorted(budget.phases[phase].items(), key=lambda item: -item[1]):
        print(f"  {part:<18} {size / GIB:6.2f}")
    return round(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="default: a twin of the student")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--dry-run", action="store_true", help="the plan alone")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        stage, settings = CASES[options.case]
        common = [*COMMON, *sized_for_cpu(), *settings, f"student.path={options.student}", f"run_dir={folder}"]
        common += [f"train.init={options.student}"] if options.case == "ppo" else []
        teacher = options.teacher or twin(options.student, folder / "twin")
        common += [f"teacher.path={teacher}", f"data.train_file={folder}/data/train.parquet"]
        common += [f"data.collect_file={folder}/data/train.parquet", "train.mini_batch_size=8", *options.overrides]
        stages = Stages(folder, report_every_s=30)
        if not (folder / "data").exists():
            shutil.rmtree(folder / "source", ignore_errors=True)
            write_source(folder / "source")
            prepare_own(folder / "source", folder / "data", config=load_config(common))
        planned = plan(stage, common)
        if options.dry_run:
            return
        index = folder / "indexes" / "own"
        if not index.exists():
            corpus = ["--corpus", str(folder / "data" / "corpus.jsonl"), "--out", str(index), "--method", "bm25"]
            stages.run(index=[*python_module("retriever.build"), *corpus])
        with retrieval_server(stages, folder / "indexes", default="own") as url:
            served = [*common, f"retriever.url={url}"]
            if stage == "distill" and not (folder / "collect").exists():
                stages.run(collect=[*python_module("dgpo"), "collect", *served])
            shutil.rmtree(folder / stage, ignore_errors=True)
            with PeakMemory() as memory:
                stages.run(**{stage: [*python_module("dgpo"), stage, *served]})
            peak = memory.peak_bytes
            print(f"peak PSS of all processes {peak / GIB:.2f} GiB, {peak / planned:.2f} of the plan")
            print(f"{stage} took {stages.wall_s[stage]:.0f} s, start included")


if __name__ == "__main__":
    with stopped_by_sigterm():
        main()
