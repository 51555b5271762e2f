"""Removes shared-memory segments that a killed run left behind: veRL's weight buckets on hosts without CUDA IPC."""

from __future__ import annotations

from pathlib import Path


def remove_abandoned_segments(folder: Path = Path("/dev/shm"), prefix: str = "verl_weights_") -> int:
    """Unlinks segments of that name that no living process maps.

    Returns:
        How many were removed.
    """
    segments = [path for path in folder.glob(f"{prefix}*") if path.is_file()] if folder.is_dir() else []
    if not segments:
        return 0
    mapped = _mapped_names(prefix)
    abandoned = [path for path in segments if path.name not in mapped]
    for path in abandoned:
        path.unlink(missing_ok=True)
    return len(abandoned)


def _mapped_names(prefix: str) -> set[str]:
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # another user's process, or one that ended meanwhile
        names.update(Path(line.split()[-1]).name for line in text.splitlines() if prefix in line)
    return names
