"""The whole method on the tiny world, by the very commands that run it at scale, one process per stage.

world -> indexes + teacher (side by side) -> retrieval server -> collect -> distill -> train -> test -> report

python -m dgpo quickstart [seed=2] [experiment=ppo] [key=value ...]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dgpo.checks import check_named, check_pipeline
from dgpo.config.load import chosen, load_config
from dgpo.config.schema import Config
from dgpo.config.stages import stage_model
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.hardware.machine import check_start
from dgpo.pipeline import tiny
from dgpo.pipeline.processes import PeakMemory, Stages, python_module
from dgpo.runs.asking import write_asking
from dgpo.runs.replacing import check_target
from dgpo.runs.summary import read_results

NUM_EXAMPLES = 6  # questions that `ask` offers


def quickstart(overrides: Sequence[str] = ()) -> Path:
    """Runs every stage of the experiment into a new `runs/quickstart-<date>-<time>` (or `run_dir=...`).

    Returns:
        The run folder, with `summary.json` and `report.html`.

    Raises:
        DgpoError: a stage failed.
        ConfigError: an override is wrong, or the folder is there; nothing was started.
    """
    started = time.perf_counter()
    config = load_config([*tiny.OVERRIDES, *overrides])
    if chosen("run_dir", overrides) is None:
        config.run_dir = f"runs/quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.run_dir)
    check_start(config, "train")
    check_target(folder, key="run_dir", stage="quickstart", replace=False)
    _check_stages(folder, config, overrides)
    if config.dry_run:
        print(f"dry run: {folder} would hold world, indexes, teacher, {', '.join(config.stages)}, test and report")
        return folder
    try:
        folder.mkdir(parents=True)
    except FileExistsError:  # another quickstart was quicker
        raise ConfigError(f"{folder} exists: choose another run_dir") from None
    stages = Stages(folder)
    print(f"run folder: {folder}   (logs: {stages.logs})", flush=True)
    with PeakMemory() as memory:
        tiny.build_missing(stages, folder, seed=config.seed)
        with tiny.served(stages, folder) as inputs:
            common = _with_inputs(inputs, folder, config, overrides)
            for stage in (*config.stages, "test"):
                stages.run(**{stage: [*python_module("dgpo"), stage, *common]})
    stages.wall_s["total"] = round(time.perf_counter() - started, 1)
    _summarize(folder, stages, config, memory.peak_bytes)
    return folder


def _with_inputs(inputs: Sequence[str], folder: Path, config: Config, overrides: Sequence[str]) -> list[str]:
    """What every stage gets: the user's settings last, so that they win."""
    return [*inputs, *_tested(config, overrides), *overrides, f"run_dir={folder}"]


def _check_stages(folder: Path, config: Config, overrides: Sequence[str]) -> None:
    """What would stop a stage, minutes from now: its settings, and files of the user's instead of the world's."""
    planned = load_config(_with_inputs(tiny.inputs(folder), folder, config, overrides))
    check_pipeline(planned)
    check_named(planned, folder)


def _tested(config: Config, overrides: Sequence[str]) -> list[str]:
    """The models of the final table: where we start, the teacher, and what each training stage made."""
    models = Path(config.run_dir) / "world" / "models"
    names = {"distill": config.distill.loss, "train": chosen("experiment", overrides) or "dgpo"}
    trained = {names[stage]: stage_model(config, stage) for stage in config.stages if stage in names}
    checkpoints = {"untrained": models / "student_untrained", "teacher": models / "teacher", **trained}
    baseline = config.distill.loss if "distill" in config.stages else "untrained"
    return [*(f"test.models.{name}={path}" for name, path in checkpoints.items()), f"test.baseline={baseline}"]


def _summarize(folder: Path, stages: Stages, config: Config, peak_bytes: int) -> None:
    from dgpo.evaluation.report import write_report
    from dgpo.runs.summary import print_summary, write_summary

    atomic_write_text(folder / "memory.txt", f"peak memory of all processes: {peak_bytes / 2**30:.2f} GiB\n")
    write_summary(folder, wall_s=stages.wall_s, config=config)
    write_report(folder)
    model = stage_model(config, next(stage for stage in reversed(config.stages) if stage != "collect"))
    write_asking(folder, overrides=tiny.OVERRIDES, model=model, corpus=tiny.CORPUS, examples=answered(folder))
    print_summary(folder)
    print(f"peak memory of all processes {peak_bytes / 2**30:.1f} GiB; report: {folder / 'report.html'}")
    print(f"next: python -m dgpo ask run_dir={folder} ask.web=true", flush=True)


def answered(folder: Path) -> list[str]:
    """Held-out questions that the last model of the test answered rightly: a newcomer's first ones should work."""
    model = list(read_results(folder)["models"])[-1]
    scores = read_jsonl(folder / "test" / model / "scores.jsonl")
    questions = list(dict.fromkeys(score["question"] for score in scores if score["em"]))
    return questions[:: max(1, len(questions) // NUM_EXAMPLES)][:NUM_EXAMPLES]
