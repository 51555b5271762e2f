"""Whether two runs of RL are the same: every metric of every step, and every weight, to the last bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import read_metrics

# Fields of the same step, but of another moment.
OF_THE_MOMENT = ("timing", "perf", "actor/perf", "critic/perf", "actor/mfu", "critic/mfu")
# How far vLLM's log-probs are from the trainer's: the last bits depend on what the engine's prefix cache held.
OF_THE_ENGINE = ("training/rollout_probs_diff", "rollout/log_prob_diff")


def repeatable(folder: Path) -> list[dict[str, float]]:
    """The records of `metrics.jsonl` without what no run repeats."""
    return [
        {name: value for name, value in record.items() if not name.startswith(OF_THE_MOMENT)}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def _of_the_engine(name: str) -> bool:
    return name.startswith(OF_THE_ENGINE)


def assert_same_run(folder: Path, expected: Path) -> None:
    for ours, theirs in zip(repeatable(folder), repeatable(expected), strict=True):
        rounded = {name: pytest.approx(value, abs=1e-6) for name, value in theirs.items() if _of_the_engine(name)}
        assert ours == theirs | rounded
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
