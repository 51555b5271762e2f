"""What docs/licences.md states of models: a map, no legal advice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

LICENCES = Path(__file__).parents[2] / "docs" / "licences.md"
# What docs/licences.md calls a licence, and the hub's identifier of it.
HUB_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "Llama 3.2 Community License": "llama3.2",
    "Llama 3.1 Community License": "llama3.1",
}


def licence_of(model: str) -> str | None:
    """The licence of a model in docs/licences.md, without emphasis; None where it is not listed."""
    for cells in _rows():
        if f"`{model}`" in [name.strip() for name in cells[0].split(",")] and len(cells) == 4:
            return cells[2].replace("**", "")
    return None


def inherited(student: str, teachers: Sequence[str]) -> list[str]:
    """Rows of "What you make from them" for this student and these teachers."""
    names = " ".join((student, *teachers)).lower()
    pairs = {
        "Llama pair": "llama" in names,
        "3B pair": "qwen" in names and any(re.search(r"\b3b\b", name.lower()) for name in teachers),
        "7B pair": "qwen" in names and any(re.search(r"\b7b\b", name.lower()) for name in teachers),
    }
    chosen = tuple(pair for pair, applies in pairs.items() if applies)
    rows = [cells for cells in _rows() if chosen and cells[0].endswith(chosen)]
    return [". ".join(text for text in (cells[1], cells[2]) if text) + "." for cells in rows]


def _rows() -> list[list[str]]:
    """Cells of every table row of docs/licences.md."""
    lines = LICENCES.read_text(encoding="utf-8").splitlines() if LICENCES.is_file() else []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
