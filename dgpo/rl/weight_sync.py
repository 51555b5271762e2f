"""New weights on their way from trainer to engine, under names that carry the run's tag.

veRL keeps runs apart by Ray's job id, which is the same in every private Ray: the engine of one run could load the
weights of another. Its names in shared memory do not say whose they are when they are left behind.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender, create_shared_memory

from dgpo.runs.processes import run_tag
from dgpo.runs.remains import SEGMENT

JOB = "VERL_RAY_JOB_ID"  # veRL's receiver names its socket after it


def tag_receiver() -> None:
    """Engine processes that this one starts from now on listen at this run's sockets."""
    os.environ[JOB] += f"-{run_tag()}"


class TaggedSender(BucketedWeightSender):
    """Meets the receivers of its own run only. Takes the socket's name as veRL makes it."""

    def __init__(self, zmq_handle: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(zmq_handle.replace("-replica-", f"-{run_tag()}-replica-"), *args, **kwargs)

    def _init_buffer(self) -> None:
        if not self.use_shm:
            super()._init_buffer()
            return
        name = f"{SEGMENT.format(tag=run_tag())}{uuid.uuid4().hex}"
        self.shm = create_shared_memory(self.bucket_size, name)
        self.buffer = torch.frombuffer(self.shm.buf, dtype=torch.uint8)
        self.socket.send_pyobj({"name": name, "size": self.bucket_size})
        self.socket.recv()
