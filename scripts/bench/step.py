"""Steps of RL on the real engine, by part.

    python scripts/bench/step.py [--steps 8] [key=value ...]
    python scripts/bench/step.py --against train.reuse_log_probs_within=0.001 [key=value ...]
    python scripts/bench/step.py --folder runs/bench --out step.json --trace trace.json

Overrides are those of `dgpo train`. Without a `retriever.url` among them it is the tiny world with the student after
its cold start: what is missing of it is made in `--folder`, once (2 minutes). The first step warms up and is left out;
the others give medians, which add up to the median step but for rounding of medians. `--against` runs a second
configuration in turn with the first, each `--rounds` times, and compares the two.

`--trace` writes the last run's timeline for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dgpo.files import read_jsonl
from dgpo.pipeline import tiny
from dgpo.pipeline.processes import Stages, python_module
from dgpo.rl.timeline import TRAINER, Span, chrome_trace, read_spans
from dgpo.runs.stopping import stopped_by_sigterm

# What the trainer calls a part -> its name in the table. What a step is, is in `parts_of_step`.
TRAINER_PARTS = {
    "old_log_prob": "old log-probs",
    "teacher": "teacher",
    "values": "values",
    "adv": "advantages",
    "update_critic": "update critic",
    "update_actor": "update actor",
    "save_checkpoint": "checkpoint",
    "update_weights": "weight sync",
}
COLUMN = 26


@contextlib.contextmanager
def inputs(folder: Path, overrides: Sequence[str]) -> Iterator[list[str]]:
    """What `train` needs besides the overrides: nothing, or a tiny world and its retrieval server."""
    if any(override.startswith("retriever.url=") for override in overrides):
        yield []
        return
    stages = Stages(folder)
    tiny.build_missing(stages, folder, seed=1)
    with tiny.served(stages, folder) as world:
        for stage in ("collect", "distill"):
            if not (folder / stage / "manifest.json").exists() and not (folder / "distill" / "model").exists():
                stages.run(**{stage: [*python_module("dgpo"), stage, *world, f"run_dir={folder}"]})
        yield [*world, f"train.init={folder / 'distill' / 'model'}"]


def run_steps(arguments: Sequence[str], run_dir: Path, *, steps: int) -> Path:
    """Trains for some steps. Returns the stage's folder."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    settings = [f"train.num_steps={steps}", f"train.save_every={steps - 1}", "train.validate_every=1000000"]
    own = [f"run_dir={run_dir}", "train.timeline=true", "data.validation_file=null"]
    log = run_dir / "train.log"
    with log.open("wb") as file:
        command = [*python_module("dgpo"), "train", *settings, *arguments, *own]
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        sys.exit(f"dgpo train ended with {result.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
    return run_dir / "train"


def parts_of_step(spans: Sequence[Span], next_start: float) -> dict[str, float]:
    """Seconds of one step by part, from its spans; they add up to the time until the next step starts.

    The rollout's wall time is divided by what the engine had to do: `generation` while any episode generates,
    `search wait` while none does and any searches, `reward` while episodes are only scored, `rollout, rest` otherwise.
    """
    trainer = {span.name: span.end - span.start for span in spans if span.track == TRAINER}
    whole = next(span for span in spans if span.track == TRAINER and span.name == "step")
    rollout = trainer["prepare"] + trainer["gen"]
    episodes = [span for span in spans if span.track != TRAINER]
    parts, covered = {}, 0.0
    names: list[str] = []
    for name, label in (("generate", "generation"), ("search", "search wait"), ("score", "reward")):
        names.append(name)
        union = covered_s([(span.start, span.end) for span in episodes if span.name in names])
        parts[label] = union - covered
        covered = union
    parts["rollout, rest"] = rollout - covered
    parts |= {label: trainer.get(name, 0.0) for name, label in TRAINER_PARTS.items()}
    parts["initial policy"] = trainer.get("ref", 0.0) - trainer.get("teacher", 0.0)
    total = next_start - whole.start
    parts["rest"] = total - sum(parts.values())
    return {**parts, "step": total}


def covered_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure(train_folder: Path) -> list[dict[str, float]]:
    """Every step but the first: seconds by part, and what was done in it."""
    records = {r["step"]: r for r in read_jsonl(train_folder / "metrics.jsonl")}
    spans = read_spans(train_folder / "timeline.jsonl")
    by_step = {step: [span for span in spans if span.step == step] for step in sorted(records)}
    starts = {s: next(x.start for x in spans if x.step == s and x.name == "step") for s in by_step}
    ends = {s: max(x.end for x in by_step[s]) for s in by_step}
    results = []
    for step in list(by_step)[1:]:
        record, own = records[step], by_step[step]
        parts = parts_of_step(own, starts.get(step + 1, ends[step]))
        played = [span for span in own if span.track != TRAINER]
        episodes = len({span.track for span in played})
        facts = {
            "episodes": float(episodes),
            "generated tokens": record["episode/num_policy_tokens"] * episodes,
            "tokens": record["perf/total_num_tokens"],
            "searches": record["episode/num_searches"] * episodes,
            "search s per episode": sum(s.end - s.start for s in played if s.name == "search") / episodes,
            "failed share": 1 - record["episode/em"],
        }
        results.append({**parts, **{f"# {name}": value for name, value in facts.items()}})
    return results


def medians(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every quantity. The checkpoint, written by one step in several, is shown as what it takes there."""
    table = {name: statistics.median(result[name] for result in results) for name in results[0]}
    saved = [result["checkpoint"] for result in results if result["checkpoint"] > 0]
    return table | {"checkpoint": statistics.median(saved) if saved else 0.0}


def show(columns: dict[str, list[dict[str, float]]]) -> None:
    tables = {name: medians(results) for name, results in columns.items()}
    count = len(next(iter(columns.values())))
    print(
        f"\nseconds, medians of {count} steps; the checkpoint of one step that writes it, which is no part of the sum"
    )
    print(f"{'':24}" + "".join(f"{name[-COLUMN + 2 :]:>{COLUMN}}" for name in tables))
    for part in next(iter(tables.values())):
        if part.startswith("#") or all(table[part] == 0 for table in tables.values()):
            continue
        cells = [f"{table[part]:.3f} {table[part] / table['step']:6.1%}" for table in tables.values()]
        print(f"{part:24}" + "".join(f"{cell:>{COLUMN}}" for cell in cells))
    for fact in (name for name in next(iter(tables.values())) if name.startswith("#")):
        print(f"{fact:24}" + "".join(f"{table[fact]:>{COLUMN}.2f}" for table in tables.values()))
    for label, per in (
        ("samples/s", "# episodes"),
        ("tokens/s", "# tokens"),
        ("generated tokens/s", "# generated tokens"),
    ):
        rates = [statistics.median(r[per] / r["step"] for r in results) for results in columns.values()]
        print(f"{label:24}" + "".join(f"{rate:>{COLUMN}.1f}" for rate in rates))
    if len(tables) == 2:
        first, second = tables.values()
        print(f"second / first: step {second['step'] / first['step']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each run, the first of which warms up")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="of the world and of the runs")
    parser.add_argument("--against", help="overrides of a second configuration, in one string")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each configuration, with --against")
    parser.add_argument("--out", type=Path, help="JSON of every step")
    parser.add_argument("--trace", type=Path, help="Chrome trace of the last run")
    options, overrides = parser.parse_known_args()
    folder = options.folder.resolve()
    variants: dict[str, list[str]] = {" ".join(overrides) or "default": []}
    if options.against:
        variants[options.against] = shlex.split(options.against)
    columns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    train_folder: Any = None
    with inputs(folder, overrides) as given:
        for number in range(options.rounds if options.against else 1):
            for place, (name, extra) in enumerate(variants.items()):
                run_dir = folder / "steps" / f"{number}-{place}"
                train_folder = run_steps([*given, *overrides, *extra], run_dir, steps=options.steps)
                columns[name] += measure(train_folder)
    show(columns)
    if options.out:
        options.out.write_text(json.dumps(columns, indent=1))
    if options.trace:
        options.trace.write_text(json.dumps(chrome_trace(read_spans(train_folder / "timeline.jsonl"))))


if __name__ == "__main__":
    with stopped_by_sigterm():
        main()
