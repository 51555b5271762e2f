"""examples/minimal_dgpo.py, from the untrained student to DGPO."""

import re

import pytest

from tests.conftest import run_command


@pytest.mark.engine
def test_the_minimal_example_learns_in_both_phases(tiny_world):
    result = run_command("examples/minimal_dgpo.py", "--world", str(tiny_world.folder), timeout_s=600)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = {name: float(em) for name, em in re.findall(r"^(\w+) +exact match ([\d.]+) ", result.stdout, re.MULTILINE)}
    assert list(scores) == ["untrained", "kd", "dgpo"]
    assert scores["untrained"] < 0.05
    assert scores["kd"] > 0.3
    assert scores["dgpo"] > scores["kd"] - 0.05  # of 200 questions: .035 is one standard error
