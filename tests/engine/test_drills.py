"""The fault drills of `scripts/drills.sh`, in the tiny world: each group as a slow test, one fault as a quick one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import TinyWorld
from tests.drills import playing, training, two_nodes
from tests.drills.report import Outcome
from tests.drills.world import World, served_twice

pytestmark = pytest.mark.engine


@pytest.fixture
def world(tiny_world: TinyWorld, tmp_path: Path) -> Iterator[World]:
    with served_twice(tmp_path, tiny_world.folder, tiny_world.indexes) as world:
        yield world


def test_an_engine_that_dies_in_mid_rollout_stops_the_run_at_once_saved_and_named(world: World, tmp_path: Path):
    run = training.TrainingRun(tmp_path / "run", world.overrides, logs=tmp_path)
    try:
        run.start(*training.ENGINE.overrides, "train.save_every=100")
        run.wait_until_it_works()
        step = run.last_step()
        outcome = training.hit(run, training.ENGINE)
    finally:
        run.end()
    assert outcome.seconds < 45
    assert f"The last checkpoint is of step {step}" in outcome.message or run.last_step() == step + 1


GROUPS = {"training": training.drill, "nodes": two_nodes.drill, "playing": playing.drill}


@pytest.mark.slow
@pytest.mark.parametrize("drill", GROUPS.values(), ids=GROUPS)
def test_every_fault_ends_in_recovery_or_in_a_clean_stop(
    drill: Callable[[World, Path], Iterator[Outcome]], world: World, tmp_path: Path
):
    outcomes = list(drill(world, tmp_path / "drill"))
    assert outcomes
    if missing := [outcome.fault for outcome in outcomes if "NOT RUN" in outcome.what]:
        pytest.skip(f"run, but for {missing}: they need root")
