"""Waits until what a job started beside its stage is ready; scripts/slurm/job.sh sets the time limit.

python -m dgpo.slurm.ready ports FOLDER NODE...     the port files of retrieval servers
python -m dgpo.slurm.ready retrievers URL...        /ready of each
python -m dgpo.slurm.ready ray NUM_NODES            living nodes of the cluster at RAY_ADDRESS
"""

from __future__ import annotations

import logging
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from dgpo.agent.search import open_direct

POLL_S = 0.5
ANSWER_TIMEOUT_S = 10.0


def ports_written(folder: str, *nodes: str) -> bool:
    """Whether every node's server wrote its port, which it does once it answers searches."""
    return all((Path(folder) / f"port-{node}").exists() for node in nodes)


def retrievers_ready(*urls: str) -> bool:
    """Whether every server says that it is ready, asked directly, whatever proxy the environment names."""
    try:
        for url in urls:
            open_direct(urllib.request.Request(f"{url}/ready"), ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def ray_nodes_alive(number: str) -> bool:
    """Whether the cluster at RAY_ADDRESS has at least so many living nodes."""
    import ray

    try:
        if not ray.is_initialized():
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        return sum(node["Alive"] for node in ray.nodes()) >= int(number)
    except (ConnectionError, RuntimeError, ValueError):
        return False  # the head is not there yet


CONDITIONS: dict[str, Callable[..., bool]] = {
    "ports": ports_written,
    "retrievers": retrievers_ready,
    "ray": ray_nodes_alive,
}


def main(arguments: Sequence[str]) -> None:
    name, *values = arguments
    while not CONDITIONS[name](*values):
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
