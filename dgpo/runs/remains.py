"""What a killed run leaves outside its folder: weight buckets in shared memory, and the sockets of the weight sync."""

from __future__ import annotations

from pathlib import Path

from dgpo.runs.processes import run_tag

SEGMENT = "verl_weights_{tag}_"  # and what makes it unique in the run
SOCKET = "rl-colocate-zmq-{job}-{tag}-replica-"  # and replica and rank; veRL's name with the run's tag
SHARED_MEMORY, SOCKETS = Path("/dev/shm"), Path("/tmp")


def remove_remains() -> int:
    """Removes this run's, and no other's, once its processes have ended.

    Returns:
        How many files it removed.
    """
    names = {SHARED_MEMORY: SEGMENT.format(tag=run_tag()), SOCKETS: SOCKET.format(job="*", tag=run_tag())}
    left = [path for folder, name in names.items() for path in folder.glob(f"{name}*")]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)
