"""Encoding on Ray actors: one per GPU, over as many machines as the Ray cluster has.

Every machine must see the build's folder under the same path. Without a cluster (`RAY_ADDRESS`) the actors run here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from retriever.encoders import load_encoder
from retriever.encoding import EncodedParts, EncodingJob
from retriever.errors import RetrieverError

MAX_RESTARTS = 3


class EncoderWorker:
    """Loads the encoder once and encodes the parts it is given."""

    def __init__(self, job: EncodingJob, device: str, num_threads: int, trust_remote_code: bool) -> None:
        self._parts = EncodedParts(job)
        self._model = load_encoder(
            job.encoder, device=device, num_threads=num_threads, trust_remote_code=trust_remote_code
        )

    def encode(self, number: int) -> int:
        self._parts.encode(number, self._model)
        return number


def encode_on_ray(
    job: EncodingJob, missing: list[int], *, num_workers: int, device: str, num_threads: int, trust_remote_code: bool
) -> Iterator[int]:
    """Encodes parts on `num_workers` actors, and gives each number when its file is there.

    An actor that dies is started again and its part repeated. Raises `RetrieverError` when Ray is absent.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise RetrieverError("--workers above 1 needs ray: pip install 'ray[default]', or use --workers 1") from None
    started_here = not ray.is_initialized()
    if started_here:
        local: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            local = {"num_cpus": max(os.cpu_count() or 1, num_workers * num_threads), "include_dashboard": False}
        ray.init(log_to_driver=False, **local)
    try:
        actor = ray.remote(
            num_cpus=num_threads,
            num_gpus=0 if device == "cpu" else 1,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )(EncoderWorker)
        workers = [
            actor.remote(job, device, num_threads, trust_remote_code) for _ in range(min(num_workers, len(missing)))
        ]
        pool = ActorPool(workers)
        yield from pool.map_unordered(lambda worker, number: worker.encode.remote(number), missing)
    finally:
        if started_here:
            ray.shutdown()
