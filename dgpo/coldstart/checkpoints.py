"""The settings that a distillation's checkpoints depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.coldstart.errors import CheckpointMismatchError
from dgpo.files import atomic_write_text

SETTINGS = "settings.json"


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Records what the checkpoints in `folder` depend on, or compares it with what was recorded.

    Raises:
        CheckpointMismatchError: it differs; names the keys.
    """
    path, text = folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True, default=str)
    if not path.exists():
        atomic_write_text(path, text)
        return
    before, now = json.loads(path.read_text()), json.loads(text)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise CheckpointMismatchError(
            f"the checkpoints in {folder} were made with other settings ({', '.join(changed)}): go back to them, "
            "delete the folder, or choose another run_dir"
        )
