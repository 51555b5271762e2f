"""What a run of RL goes on from: its checkpoints, and the files that must agree with them.

    checkpoints/global_step_N/{actor,critic}/   shards of every rank: model, optimiser, scheduler, random state;
                                                actor/huggingface is a model folder
    checkpoints/global_step_N/data.pt           position in the training questions
    checkpoints/global_step_N/driver.pt         random state, KL coefficient, and the metrics of step N
    checkpoints/global_step_N/manifest.json     written last: checksums of the others

The folders are veRL's own layout, and its tracker file is kept up to date for its tools.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgpo.errors import RunStoppedError, first_line
from dgpo.files import atomic_write_text, drop_records_after
from dgpo.runs.alarms import ALARMS
from dgpo.runs.checkpoints import FileEntries, checkpoint_steps, file_entries, seal, steps_to_delete, writing
from dgpo.runs.plain_values import load_plain, save_plain
from dgpo.runs.rollback import CHECKPOINT, TRACKER

Record = dict[str, float]
DATALOADER, DRIVER = "data.pt", "driver.pt"


@dataclass(frozen=True)
class RunState:
    """What the driver goes on with.

    Attributes:
        records: of the steps so far, from `metrics.jsonl`.
        unrecorded: the record of the checkpoint's own step, where its process ended before it was written.
        kl_coef: of the penalty to the initial policy, which an adaptive controller changes.
    """

    records: list[Record]
    unrecorded: Record | None = None
    kl_coef: float | None = None


def save_checkpoint(
    folder: Path,
    write_ranks: Callable[[Path], Sequence[FileEntries]],
    *,
    step: int,
    world_size: int,
    dataloader: Mapping[str, Any],
    kl_coef: float | None,
    record: Record | None,
) -> None:
    """Writes the checkpoint `folder`, whole or not at all.

    Args:
        write_ranks: makes every rank write its part below a folder; the entries of what each wrote.

    Raises:
        RunStoppedError: names the cause, and what the run can go on from.
    """
    try:
        with writing(folder) as target:
            files = {name: entry for entries in write_ranks(target) for name, entry in entries.items()}
            missing = [name for name in files if not (target / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{missing[0]} and {len(missing) - 1} more files that other nodes wrote are not in {target}: "
                    "run_dir must be on a file system that all nodes share"
                )
            save_plain(dataloader, target / DATALOADER)
            save_plain({"rng": _random_state(), "kl_coef": kl_coef, "record": record}, target / DRIVER)
            seal(
                target,
                files=files | file_entries(target, [DATALOADER, DRIVER]),
                step=step,
                world_size=world_size,
            )
    except (OSError, RuntimeError) as error:
        before = [other for other in checkpoint_steps(folder.parent, CHECKPOINT) if other != step]
        kept = f"the one after step {before[-1]} is whole" if before else "there is none before it"
        raise RunStoppedError(
            f"the checkpoint after step {step} could not be written ({_reason(error)}); {kept}. When that is "
            "corrected, repeat the command with resume=true",
            kind="CheckpointNotSavedError",
        ) from error
    atomic_write_text(folder.parent / TRACKER, str(step))


def rewind_to(metrics: Path, checkpoint: Path | None) -> RunState:
    """Makes the files of the stage agree with a checkpoint: later records and alarms go, the steps will be repeated.

    Args:
        metrics: `metrics.jsonl` of the stage.
        checkpoint: None for the beginning.
    """
    step = int(checkpoint.name.removeprefix(CHECKPOINT)) if checkpoint else 0
    records = drop_records_after(metrics, step)
    drop_records_after(metrics.with_name(ALARMS), step)
    if checkpoint is None:
        return RunState(records)
    state = load_plain(checkpoint / DRIVER)
    _set_random_state(state["rng"])
    logged = any(record["step"] == step for record in records)
    return RunState(records, None if logged else state["record"], state["kl_coef"])


def prune(
    folder: Path, scores: Mapping[int, float], *, keep_last: int, keep_best: int, keep: Iterable[int] = ()
) -> None:
    """Deletes the checkpoints that are neither among the last, nor among the best, nor to be kept besides.

    Args:
        scores: step -> validation score.
        keep: steps.
    """
    steps = checkpoint_steps(folder, CHECKPOINT)
    for step in steps_to_delete(steps, scores, keep_last=keep_last, keep_best=keep_best, keep=keep):
        # First out of the way: what a kill leaves of it is then no checkpoint, and removed at the next start.
        removed = folder / f".{CHECKPOINT}{step}.writing"
        (folder / f"{CHECKPOINT}{step}").rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _random_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def _reason(error: BaseException) -> str:
    """In one line; Ray puts a worker's error into one of its own, with the traceback as its text."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause)
