"""Several engines of one checkpoint behind one episode `Policy`: data-parallel evaluation and collection over Ray."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from dgpo.agent.episode import Generation
from dgpo.config.schema import HardwareConfig
from dgpo.engines import ray_cluster
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.errors import DgpoError, one_line

START_TIMEOUT_S = 3600.0  # for all engines together, the wait for the cluster's GPUs included
STOP_TIMEOUT_S = 60.0


def num_engines(hardware: HardwareConfig) -> int:
    """How many engines the GPUs hold that are configured and, on one node, there; on CPUs, one per node."""
    if hardware.platform == "cpu":
        return hardware.num_nodes
    num_gpus = hardware.num_gpus
    if hardware.num_nodes == 1:
        import torch

        num_gpus = min(num_gpus, torch.cuda.device_count())
    return max(1, num_gpus // hardware.engine.tensor_parallel_size)


class PolicyPool:
    """Use as `async with PolicyPool(...) as policy`. An episode stays on one engine, whose cache holds its prefix.

    Args:
        make_policy: makes the policy of one engine; called in that engine's process, maybe on another node.
        hardware: of every engine, and of the Ray that holds them (`dgpo.engines.ray_cluster`).
        size: engines.
    """

    def __init__(self, make_policy: Callable[[], VllmPolicy], *, hardware: HardwareConfig, size: int) -> None:
        self.make_policy, self.hardware, self.size = make_policy, hardware, size
        self._engines: list[Any] = []

    async def __aenter__(self) -> PolicyPool:
        """Starts the engines side by side. Raises `DgpoError` when one does not start."""
        if not ray_cluster.is_connected():
            ray_cluster.connect(self.hardware, token_folder=Path(_token_folder().name), log_to_driver=False)
        import ray

        gpus = 0 if self.hardware.platform == "cpu" else self.hardware.engine.tensor_parallel_size
        engine = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(_Engine)
        self._engines = [engine.remote(self.make_policy) for _ in range(self.size)]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.gather(*(each.start.remote() for each in self._engines))
        except Exception as error:  # Ray wraps what the engine raised
            await self._stop()
            reason = one_line(error)[-500:] or f"the engines did not start within {START_TIMEOUT_S:g} s"
            raise DgpoError(reason) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, stop: Sequence[str], seed: int | None, request_id: str
    ) -> Generation:
        """As `VllmPolicy.generate`."""
        engine = self._engines[zlib.crc32(request_id.encode()) % self.size]
        return await engine.generate.remote(
            token_ids, max_tokens=max_tokens, stop=list(stop), seed=seed, request_id=request_id
        )

    async def _stop(self) -> None:
        import ray

        engines, self._engines = self._engines, []
        with contextlib.suppress(TimeoutError):  # an engine that hangs ends with Ray
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.gather(*(each.stop.remote() for each in engines), return_exceptions=True)
        ray.shutdown()


@cache
def _token_folder() -> TemporaryDirectory[str]:
    """Keeps the token of this process's clusters to its end: Ray reads it once, and a pool may follow another."""
    return TemporaryDirectory(prefix="dgpo-ray-")


class _Engine:
    """One engine, in a process of its own."""

    def __init__(self, make_policy: Callable[[], VllmPolicy]) -> None:
        self.policy = make_policy()

    async def start(self) -> None:
        await self.policy.start()

    async def stop(self) -> None:
        await self.policy.stop()

    async def generate(self, token_ids: list[int], **options: Any) -> Generation:
        return await self.policy.generate(token_ids, **options)
