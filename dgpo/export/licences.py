"""What docs/licences.md states of models: a map, no legal advice."""

from __future__ import annotations

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


def inherited(student: str, teacher: str | None) -> list[str]:
    """Rows of "What you make from them" for this pair."""
    names = f"{student} {teacher or ''}".lower()
    size = next((size for size in ("3b", "7b") if f"{size}-" in f"{teacher or ''}-".lower()), None)
    pair = "Llama pair" if "llama" in names else f"{size.upper()} pair" if "qwen" in names and size else None
    if pair is None:
        return []
    return [f"{cells[1]}. {cells[2]}".strip(". ") + "." for cells in _rows() if cells[0].endswith(pair)]


def _rows() -> list[list[str]]:
    """Cells of every table row of docs/licences.md."""
    lines = LICENCES.read_text(encoding="utf-8").splitlines() if LICENCES.is_file() else []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
