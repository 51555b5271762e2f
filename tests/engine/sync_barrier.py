"""Loaded into every process of a run by `VERL_USE_EXTERNAL_MODULES`: the runs bind the sockets of a sync at one time.

`SYNC_BARRIER` names a folder that they share, and `SYNC_RUNS` how many they are.
"""

import os
import time
from pathlib import Path

import zmq

from dgpo.runs.processes import run_tag

TIMEOUT_S = 300.0
_bind = zmq.Socket.bind
_num_syncs = 0


def bind_together(self, address, *args, **kwargs):
    if "rl-colocate-zmq" in str(address):
        _wait_for_the_others(Path(os.environ["SYNC_BARRIER"]))
    return _bind(self, address, *args, **kwargs)


def _wait_for_the_others(folder):
    global _num_syncs
    _num_syncs += 1
    (folder / f"{_num_syncs}-{run_tag()}").touch()
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(folder.glob(f"{_num_syncs}-*"))) < int(os.environ["SYNC_RUNS"]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"sync {_num_syncs}: the other run did not come")
        time.sleep(0.01)


zmq.Socket.bind = bind_together
