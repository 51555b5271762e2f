"""Whether what a stage has made is of what it would be made of now."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dgpo.coldstart.collect import collect_settings
from dgpo.coldstart.distill import distill_settings
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows
from dgpo.evaluation.stage import measured_settings, read_test_sets
from dgpo.pipeline.plan import LAST_FILES, RESULTS, PlannedStage, distinct
from dgpo.rl.train import train_settings
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.settings import check_same, differences


def is_current(stage: PlannedStage) -> bool:
    """Whether a stage that has finished stands. A test of something else does not, and is to be run again.

    Raises:
        ConfigError: another stage was made of something else; it costs too much to be thrown away unasked.
    """
    config, folder = stage.config, stage.run_dir / RESULTS[stage.stage]
    if stage.stage in LAST_FILES:  # a measurement
        tested = set(distinct(stage.models).values()) if stage.models else config.test.models
        return all(_is_measured(config, name, folder / LAST_FILES[stage.stage]) for name in tested)
    before = json.loads((folder / MANIFEST).read_text()).get("settings")
    if before is None:
        print(f"{folder}: what it was made from was not recorded, and is not compared", file=sys.stderr)
    else:
        check_same(before, _settings(stage.stage, config), made=folder)
    return True


def _settings(stage: str, config: Config) -> dict[str, Any]:
    if stage == "collect":
        return collect_settings(config, read_rows(config.data.collect_file or ""))
    return distill_settings(config) if stage == "distill" else train_settings(config)


def _is_measured(config: Config, name: str, results: Path) -> bool:
    manifest, shown = results.parent / name / MANIFEST, json.loads(results.read_text())["models"].get(name)
    before = json.loads(manifest.read_text()).get("settings") if manifest.exists() else None
    if not before or not shown or shown.get("weights") != before["weights"]:
        return False
    rows = [row for group in read_test_sets(config).values() for row in group]
    return not differences(before, measured_settings(config, name, rows))
