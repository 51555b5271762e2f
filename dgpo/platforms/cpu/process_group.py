"""veRL builds the backend string `cpu:gloo,cpu:gloo` when the device is the CPU, which torch refuses.

`initialize_global_process_group_ray` has no extension point in veRL 0.9.1; this wrapper passes its own `backend`
argument, and goes when veRL stops naming the CPU twice (utils/distributed.py).
"""

from __future__ import annotations

import functools
from typing import Any

import verl.utils.distributed as verl_distributed

_original = verl_distributed.initialize_global_process_group_ray


@functools.wraps(_original)
def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> Any:
    return _original(timeout_second=timeout_second, backend=backend or "cpu:gloo")


verl_distributed.initialize_global_process_group_ray = initialize_global_process_group_ray
