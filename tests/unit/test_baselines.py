"""The comparison of two recordings sees a bit of a weight, a token of an episode and the name of a metric."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgpo.checks.settings import check_settings
from dgpo.config.load import load_config
from tests.baselines import UNITS, arguments, compare, read_run

WEIGHTS = torch.tensor([1.0, 2.0])
FLIPPED = torch.tensor([1.0, 2.0]).nextafter(torch.tensor([1.0, 3.0]))
EPISODE = {"response_ids": [5, 7], "searches": [{"query": "q", "latency_s": 0.25}]}
METRICS = {"step": 1, "actor/loss": 0.1, "timing_s/step": 2.0}


def recording(folder: Path, *, weights=WEIGHTS, critic=WEIGHTS, episode=EPISODE, metrics=METRICS) -> Path:
    """A recording of one unit, made from a run folder of the form that `train` leaves."""
    stage = folder / "grpo" / "train"
    for name in ("model", "episodes", "checkpoints/global_step_10/critic", "checkpoints/global_step_9/critic"):
        (stage / name).mkdir(parents=True)
        torch.save({"layer": critic}, stage / name / "model_world_size_1_rank_0.pt")
    torch.save({"layer": WEIGHTS}, stage / "checkpoints/global_step_9/critic/model_world_size_1_rank_0.pt")
    save_file({"layer": weights}, stage / "model" / "model.safetensors")
    (stage / "episodes" / "step_1.jsonl").write_text(json.dumps(episode) + "\n")
    (stage / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (folder / "grpo.json").write_text(json.dumps(read_run(stage)))
    return folder


def differences(tmp_path: Path, **changed) -> list[str]:
    return compare(recording(tmp_path / "a"), recording(tmp_path / "b", **changed), ["grpo"])


def test_equal_runs_have_no_difference(tmp_path: Path):
    assert differences(tmp_path) == []


def test_what_is_of_the_moment_does_not_differ(tmp_path: Path):
    slower = EPISODE | {"searches": [{"query": "q", "latency_s": 9.5}]}
    assert differences(tmp_path, episode=slower, metrics=METRICS | {"timing_s/step": 3.0}) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"weights": FLIPPED}, ["grpo: weights/model/layer: "]),
        ({"critic": FLIPPED}, ["grpo: weights/critic/layer: "]),
        ({"weights": WEIGHTS.double()}, ["grpo: weights/model/layer: "]),
        ({"episode": EPISODE | {"response_ids": [5, 8]}}, ["grpo: episodes/episodes/step_1.jsonl: "]),
        ({"metrics": METRICS | {"actor/loss": 0.1 * (1 + 1e-11)}}, ["grpo: metrics/1/actor/loss: 0.1 and "]),
        (
            {"metrics": {"step": 1, "actor/loss": 0.1, "timing_s/whole": 2.0}},
            ["grpo: metrics/1/timing_s/step: None and absent", "grpo: metrics/1/timing_s/whole: absent and None"],
        ),
    ],
    ids=["a flipped bit", "a flipped bit of the critic", "another type", "a token", "a metric", "a renamed metric"],
)
def test_a_difference_is_one_line(changed: dict, expected: list[str], tmp_path: Path):
    found = differences(tmp_path, **changed)
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)


def test_a_metric_may_differ_in_its_last_digits(tmp_path: Path):
    assert differences(tmp_path, metrics=METRICS | {"actor/loss": 0.1 * (1 + 1e-13)}) == []


def test_a_unit_that_was_not_recorded_is_a_difference(tmp_path: Path):
    (line,) = compare(recording(tmp_path / "a"), tmp_path / "b", ["grpo"])
    assert line == f"grpo: not recorded: {tmp_path / 'b' / 'grpo.json'}"


def test_every_unit_is_a_command_that_exists():
    from dgpo.__main__ import COMMANDS

    assert {command for command, _ in UNITS.values()} <= set(COMMANDS)


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_is_a_command_with_settings_that_go_together(name: str, tmp_path: Path):
    stage, *overrides = arguments(name, world=tmp_path, out=tmp_path, url="http://node0:8000")
    check_settings(load_config(overrides), [stage])
