"""veRL's synchronous trainer under a watchdog: it says which phase it is in and whom it depends on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import ray
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from dgpo.runs.watchdog import Watchdog


class WatchedTrainer(PPOTrainerSync):
    """Whatever happens in mid-rollout leaves the weights as they are: they are saved before the run ends."""

    watchdog: Watchdog  # of this process, set by the task runner

    @abstractmethod
    def _save_before_step(self) -> None:
        """Saves the last step whose update was made, in the middle of the next one."""

    def fit(self, agent_loop_manager: Any) -> None:
        self._watch_all(agent_loop_manager)
        super().fit(agent_loop_manager)

    def _watch_all(self, agent_loop_manager: Any) -> None:
        watch = self.watchdog.watch
        for rank, worker in enumerate(self.actor_rollout_wg.workers):
            watch(f"model worker {rank}", worker, holds_weights=True)
        for rank, worker in enumerate(self.critic_wg.workers if self.use_critic else ()):
            watch(f"critic worker {rank}", worker, holds_weights=True)
        for replica in self.llm_server_manager.get_replicas():
            for server in replica.servers:
                watch(f"vLLM server {replica.replica_rank}", server)
        for number, worker in enumerate(agent_loop_manager.agent_loop_workers):
            watch(f"agent-loop worker {number}", worker)
        watch("load balancer", self.llm_server_manager.global_load_balancer)
        watch("episode store", ray.get_actor("TransferQueueController", namespace="transfer_queue"))
        for number in range(self.config.transfer_queue.backend.SimpleStorage.num_data_storage_units):
            watch(f"episode store unit {number}", ray.get_actor(f"TransferQueueStorageUnit#{number}"))

    def _build_replay_buffer(self) -> Any:
        """Where veRL polls for finished episodes, the fault is looked at too."""
        buffer = super()._build_replay_buffer()
        wait = buffer._wait_for_next_poll

        def wait_unless_fault(*args: Any) -> float:
            self._stop_on_fault()
            return wait(*args)

        buffer._wait_for_next_poll = wait_unless_fault
        return buffer

    def _stop_on_fault(self) -> None:
        fault = self.watchdog.fault
        if fault is not None and self.watchdog.weights_are_whole:
            self._save_before_step()
            raise fault

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self.watchdog.enter("rollout")

    def on_sample_end(self) -> None:
        """The episodes are there; those of a dead engine failed at once, before its death was looked for."""
        try:
            super().on_sample_end()
        except Exception as error:
            if self.watchdog.explain(error) is error:
                raise
            self._stop_on_fault()
            raise self.watchdog.fault from error
        self.watchdog.enter("update")

    def on_step_end(self) -> None:
        with self.watchdog.during("sync"):
            super().on_step_end()

    def _validate(self) -> dict[str, Any]:
        with self.watchdog.during("validate"):
            return super()._validate()
