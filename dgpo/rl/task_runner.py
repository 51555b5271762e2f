"""The process that drives the trainer. The command that starts it imports neither veRL nor torch."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

from dgpo.config.schema import Config
from dgpo.rl.settings import TrainerSettings, trainer_settings


class TaskRunner:
    """A Ray actor: makes veRL's configuration, and runs our trainer as veRL's `TaskRunnerV1` runs its own."""

    def run(self, config: Config, folder: Path, checkpoint: Path | None) -> None:
        """Trains to the end.

        Args:
            config: a checked configuration, its paths absolute.
            folder: of the stage.
            checkpoint: to go on from; None begins with the initial model.

        Raises:
            RunStoppedError: the trainer stopped for a reason that its user can act on.
            StoppedOnRequestError: it was asked to.
        """
        gc.disable()  # until the libraries are there: collections walk their objects again and again, and find nothing
        from dgpo.rl.verl_config import to_verl

        verl = to_verl(config, folder, checkpoint)
        # The episode store's processes start while this one imports what the trainer needs.
        store = threading.Thread(target=_start_episode_store, args=(verl.transfer_queue,), name="episode store")
        store.start()
        import dgpo.rl.rollout_server  # noqa: F401  registers the server
        from dgpo.runs.watchdog import Watchdog, run_watched

        trainer_class = self.trainer_class()
        gc.freeze()
        gc.enable()
        store.join()
        settings = trainer_settings(config, folder)
        watchdog = Watchdog(settings.limits)
        run_watched(lambda: _train(trainer_class, verl, settings, watchdog), watchdog)

    def trainer_class(self) -> type:
        from dgpo.rl.loop import DGPOTrainer

        return DGPOTrainer


def _train(trainer_class: type, verl: Any, settings: TrainerSettings, watchdog: Any) -> None:
    """One life of the trainer; its loggers and the episode store end with it."""
    from pprint import pprint

    import transfer_queue
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ
    from verl.utils.config import validate_config
    from verl.utils.logging_utils import configure_verl_logging

    validate_config(config=verl, use_reference_policy=need_reference_policy(verl), use_critic=need_critic(verl))
    configure_verl_logging()
    pprint(OmegaConf.to_container(verl, resolve=True))
    OmegaConf.resolve(verl)
    transfer_queue.init(verl.transfer_queue)  # runs already, or fails as it did in its thread
    trainer: Any = None
    succeeded = False
    try:
        trainer = trainer_class(verl, settings, watchdog)
        trainer.init()
        episodes = AgentLoopManagerTQ.create(
            config=verl,
            llm_client=trainer.get_llm_client(),
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        trainer.fit(episodes)
        succeeded = True
    finally:
        try:
            if hasattr(trainer, "logger"):
                trainer.logger.finish(exit_code=0 if succeeded else 1)
        finally:
            transfer_queue.close()


def _start_episode_store(settings: Any) -> None:
    """Ahead of `_train`, which does so again."""
    import transfer_queue

    transfer_queue.init(settings)
