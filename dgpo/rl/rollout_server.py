"""veRL's vLLM server, as a process that ends with its engine, and whose engine ends with it.

Ray sees the death of an actor at once, but not that of the engine process behind it: veRL would wait. And an engine
whose server was killed would keep its GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.v1.engine.exceptions import EngineDeadError

from dgpo.engines.turn_sampling import sampling_arguments
from dgpo.engines.vllm_patches import run_in_process, tether_engine_cores
from dgpo.rl.weight_sync import tag_receiver

POLL_S = 0.5
TAKE_WEIGHTS = "update_weights_from_ipc"  # a method of veRL's worker extension


class TetheredServer(vLLMHttpServer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tag_receiver()

    async def run_server(self, args: argparse.Namespace) -> None:
        tether_engine_cores()
        if args.distributed_executor_backend == "uni":
            run_in_process()
        await super().run_server(args)
        self._engine_watch = asyncio.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        while not self.engine.errored:
            await asyncio.sleep(POLL_S)
        print("vLLM's engine process died; its server ends", file=sys.stderr, flush=True)
        os._exit(1)

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **others: Any
    ) -> Any:
        """veRL's, sampled as every turn of an episode is. A request may find the engine dead before the next poll does.

        Args:
            sampling_params: veRL's own, with the turn's `max_tokens`, `stop` and `seed`.
        """
        wanted = sampling_params["logprobs"]
        turn = {name: sampling_params[name] for name in ("temperature", "max_tokens", "stop", "seed")}
        arguments = sampling_arguments(self.engine.get_tokenizer(), **turn, log_probs=wanted)
        try:
            return await super().generate(
                prompt_ids, {**sampling_params, **arguments, "logprobs": wanted}, request_id, **others
            )
        except EngineDeadError:
            traceback.print_exc()
            os._exit(1)

    async def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """veRL's; when new weights are not taken, the process ends, as their sender would wait for ever."""
        try:
            return await super().collective_rpc(method, *args, **kwargs)
        except Exception:
            if method != TAKE_WEIGHTS:
                raise
            traceback.print_exc()
            os._exit(1)


class TetheredReplica(vLLMReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TetheredServer)


RolloutReplicaRegistry.register("vllm", lambda: TetheredReplica)
