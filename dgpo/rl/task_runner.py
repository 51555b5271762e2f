"""The process that drives veRL's trainer. The command that starts it imports neither veRL nor torch."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

from dgpo.config.schema import Config


class TaskRunner:
    """A Ray actor: makes veRL's configuration, and runs veRL's own task runner with our trainer."""

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

        trainer = self.register_trainer()
        gc.freeze()
        gc.enable()
        store.join()
        from verl.trainer import main_ppo
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        validate_config(config=verl, use_reference_policy=need_reference_policy(verl), use_critic=need_critic(verl))
        trainer.watchdog = watchdog = Watchdog(dict(verl.actor_rollout_ref.teacher.phase_limits))
        runner = main_ppo.TaskRunnerV1.__ray_metadata__.modified_class()
        run_watched(lambda: runner.run(verl), watchdog)

    def register_trainer(self) -> type:
        """The trainer that veRL is to find by `TRAINER_NAME`."""
        from dgpo.rl.trainer import DGPOTrainer

        return DGPOTrainer


def _start_episode_store(settings: object) -> None:
    """veRL starts it again, which does nothing where it runs already. An error comes back there."""
    import transfer_queue

    transfer_queue.init(settings)
