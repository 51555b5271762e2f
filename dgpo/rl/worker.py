"""The actor's Ray worker with a frozen teacher of its own beside it.

veRL 0.9.1 can only put a copy of the actor's own model behind its reference policy. Its `ref_worker_cls` hook is
called with the complete settings of that frozen model, which is the place to build one with the teacher's weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from dgpo.algorithms.selective_kl import TEACHER_FORMS
from dgpo.platforms import gemma3_critic, token_engine  # noqa: F401  register a critic and veRL's engine of GPUs
from dgpo.rl.exact_loss import ExactTeacherLoss, TeacherReader
from dgpo.rl.frozen import FrozenWorker
from dgpo.rl.rank_checkpoints import load_rank, rank_entries
from dgpo.rl.updates import num_skipped, set_learning_rate
from dgpo.runs.checkpoints import FileEntries


class TeacherGuidedWorker(ActorRolloutRefWorker):
    """Actor, rollout and one or two frozen models: the teacher, and the initial policy where a penalty asks for it.

    `config.teacher` (`dgpo.rl.settings.TeacherSettings`) says what is needed. With the `exact` form the actor's loss
    reads the teacher in this process; the trainer asks for its log-probs of chosen episodes.
    """

    teacher: TrainingWorker | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        from verl.workers.rollout.vllm_rollout import vllm_rollout

        from dgpo.rl.weight_sync import TaggedSender

        vllm_rollout.BucketedWeightSender = TaggedSender
        self.ref_worker_cls = self._build_frozen_models
        super().init_model()
        term = self.config.teacher
        if self.teacher is not None and TEACHER_FORMS[term.form].in_loss:
            self.actor.set_loss_fn(ExactTeacherLoss(self.loss_fn, coef=term.coef))
            self.actor.engine.read_teacher = TeacherReader(self.teacher.engine)

    def _build_frozen_models(self, config: Any) -> TrainingWorker:
        """Builds the teacher, and returns the model that veRL is to use as its reference policy."""
        term = self.config.teacher
        if term.path is not None:
            self.teacher = FrozenWorker(
                config=dataclasses.replace(config, model_config=_teacher_model(self.config.model, term))
            )
            if not term.needs_initial_policy:
                return self.teacher
            self.teacher.reset()
        return FrozenWorker(config=config)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    def compute_teacher_log_prob(self, data: Any) -> Any:
        """Teacher log-probs of the sampled tokens of the given episodes, under the key `log_probs`."""
        assert self.teacher is not None
        output = self.teacher.infer_batch(data=data)
        return output.cpu() if output is not None else None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: Any) -> Any:
        size = self.config.teacher.mini_batch_size  # in episodes: veRL's, in questions, need not be a whole number
        tu.assign_non_tensor(data, mini_batch_size=size, global_batch_size=size)
        return count_skipped_updates(self.actor.train_mini_batch(data=data))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> FileEntries:
        """Returns the entries of the files that this rank wrote."""
        super().save_checkpoint(local_path, *args, **kwargs)
        return rank_entries(local_path, rank=self.rank)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        engine = self.actor.engine
        load_rank(engine, local_path)
        set_learning_rate(engine.optimizer, engine.lr_scheduler, engine.optimizer_config.lr)


class SeededTrainingWorker(TrainingWorker):
    """A critic whose new value head starts from the run's seed: veRL draws it from an unseeded generator."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        torch.manual_seed(self.engine_config.seed)
        super().reset()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> FileEntries:
        """Returns the entries of the files that this rank wrote."""
        super().save_checkpoint(local_path, *args, **kwargs)
        return rank_entries(local_path, rank=self.rank)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        load_rank(self.engine, local_path)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: Any) -> Any:
        return count_skipped_updates(super().train_mini_batch(data))


def count_skipped_updates(output: Any) -> Any:
    """Adds the metric `skipped_updates`.

    Args:
        output: what `train_mini_batch` returned, None on ranks that have nothing to say.
    """
    if output is None:
        return None
    metrics = tu.get(output, "metrics")
    metrics["skipped_updates"] = num_skipped(metrics["grad_norm"])
    return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}).cpu()


def _teacher_model(model: DictConfig, term: DictConfig) -> Any:
    """The actor's model settings with the teacher's weights."""
    settings = OmegaConf.create(OmegaConf.to_container(model, resolve=True))
    return omega_conf_to_dataclass(
        OmegaConf.merge(settings, {"path": term.path, "trust_remote_code": term.trust_remote_code})
    )
