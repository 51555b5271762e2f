"""Results that outlived the weights that they were measured of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.errors import DataError
from dgpo.runs.identity import model_identity


def stale_models(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each model whose checkpoint is no longer the one that was measured; of those that are at hand."""
    return [
        f"{folder}: the numbers of {name} belong to other weights than {model['checkpoint']} now holds; test it again "
        "with resume=true"
        for name, model in models.items()
        if "weights" in model and Path(model["checkpoint"]).is_dir() and not _is(model["checkpoint"], model["weights"])
    ]


def _is(checkpoint: str, weights: str) -> bool:
    try:
        return model_identity(checkpoint) == weights
    except DataError:
        return False
