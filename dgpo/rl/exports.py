"""The checkpoints of a run that others read, as Hugging Face folders whose generation config carries the stop strings.

    train/model                    the last step
    train/models/best              the best on data.validation_file, where there is one
    train/models/before_collapse   the last step before the first alarm (docs/stability.md); without an alarm the last,
                                   without a checkpoint from before it the first that was kept, with a word
    train/models/step_N            each of train.keep_steps that was reached
    train/models/steps.json        which step each of them is

Weights are hard links to the checkpoint's: a model more takes no space.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.config.stages import MODEL_STEPS, initial_model, step_model
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.models.model_folders import write_dtype, write_generation_config
from dgpo.runs.alarms import ALARMS
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.checkpoints import checkpoint_steps, writing
from dgpo.runs.rollback import CHECKPOINT, LAST_GOOD, METRICS, TRACKER, link_or_copy, num_rollbacks

VALIDATION_SCORE = "validation/em"


def export_models(config: Config, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Writes what the module's docstring lists. Returns `train/model`, whose manifest is the stage's last act.

    Args:
        folder: of the stage, its last checkpoint whole.
        settings: what the run depends on, for the manifest.
    """
    last = int((folder / "checkpoints" / TRACKER).read_text())
    sources = _sources(config, folder, last)
    shutil.rmtree(folder / "models", ignore_errors=True)
    for name, checkpoint in sources.items():
        with writing(folder / "models" / name) as temporary:
            _copy(checkpoint, temporary)
    steps = {name: int(path.name.removeprefix(CHECKPOINT)) for name, path in sources.items()}
    atomic_write_text(folder / MODEL_STEPS, json.dumps({"model": last, **steps}, indent=1) + "\n")
    target = folder / "model"
    with writing(target) as temporary:
        _copy(folder / "checkpoints" / f"{CHECKPOINT}{last}", temporary)
        write_manifest(
            temporary,
            stage="train",
            inputs={"init": initial_model(config, "train")[1], "teacher": config.teacher.path},
            config=to_yaml(config),
            counts={"steps": last, "rollbacks": num_rollbacks(folder)},
            seed=config.seed,
            settings=settings,
        )
    return target


def _sources(config: Config, folder: Path, last: int) -> dict[str, Path]:
    """Name below `models` -> checkpoint."""
    checkpoints = folder / "checkpoints"
    there = {step: checkpoints / f"{CHECKPOINT}{step}" for step in checkpoint_steps(checkpoints, CHECKPOINT)}
    scores = {step: score for step, score in _validation_scores(folder).items() if step in there}
    sources = {}
    if scores:
        sources["best"] = there[max(scores, key=lambda step: (scores[step], step))]
    sources["before_collapse"] = _before_collapse(folder, there, last)
    for step in config.train.keep_steps:
        if step in there:
            sources[step_model(step)] = there[step]
    return sources


def _before_collapse(folder: Path, there: Mapping[int, Path], last: int) -> Path:
    good = max(checkpoint_steps(folder / LAST_GOOD, CHECKPOINT), default=None)
    if good is not None:
        return folder / LAST_GOOD / f"{CHECKPOINT}{good}"
    alarms = read_jsonl(folder / ALARMS, growing=True)
    if not alarms:
        return there[last]
    first = min(there)
    print(
        f"models/before_collapse is the first checkpoint kept, of step {first}: none is from before the alarm of step "
        f"{alarms[0]['step']}; a shorter train.save_every keeps one",
        flush=True,
    )
    return there[first]


def _validation_scores(folder: Path) -> dict[int, float]:
    records = read_jsonl(folder / METRICS, growing=True)
    return {int(record["step"]): record[VALIDATION_SCORE] for record in records if VALIDATION_SCORE in record}


def _copy(checkpoint: Path, target: Path) -> None:
    shutil.copytree(checkpoint / "actor" / "huggingface", target, copy_function=link_or_copy, dirs_exist_ok=True)
    write_dtype(target)
    write_generation_config(target)
