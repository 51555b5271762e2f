"""Run folders of an older version: made at commit 5cc0d22, weights left out, folders renamed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.evaluation.curves import read_curves

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_5cc0d22.tar.gz"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_an_old_run_is_reported(old_run, capsys):
    assert main(["report", f"run_dir={old_run}"]) == 0, capsys.readouterr().err
    page = (old_run / "report.html").read_text()
    em = json.loads((old_run / "test" / "results.json").read_text())["models"]["teacher"]["average"]["em"]
    assert f"{em:.3f}".lstrip("0") in page
    assert len(read_curves(old_run, "old").training) == 6


def test_two_old_runs_are_compared(old_run, tmp_path, capsys):
    assert main(["compare", str(old_run), str(old_run), f"out={tmp_path / 'c.md'}"]) == 0, capsys.readouterr().err
    assert "teacher" in (tmp_path / "c.md").read_text()
