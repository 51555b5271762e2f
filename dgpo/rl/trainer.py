"""veRL's synchronous trainer with a teacher on the episodes that the student got wrong.

The trainer decides who is scored by what; the mathematics is in `dgpo.algorithms`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_from_nested, response_to_nested

from dgpo.algorithms.advantages import group_relative_advantages
from dgpo.algorithms.selective_kl import compute_gate, selective_kl_advantages, selective_kl_rewards
from dgpo.config.schema import StabilityConfig
from dgpo.rl.episode_log import FIELDS as LOGGED_FIELDS
from dgpo.rl.episode_log import EpisodeLog
from dgpo.rl.metrics import choose_monitored, episode_metrics, log_prob_disagreement, sampled_kl, teacher_kl_metrics
from dgpo.rl.timed_trainer import TimedTrainer
from dgpo.rl.verl_config import TRAINER_NAME
from dgpo.rl.worker import SeededTrainingWorker, TeacherGuidedWorker
from dgpo.runs.alarms import report_alarms
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.checkpoints import FileEntries
from dgpo.runs.guards import FROM_TRAINED_WEIGHTS, SOURCES, check_finite
from dgpo.runs.rollback import CHECKPOINT, keep_last_good
from dgpo.runs.run_state import append_record, begin_from, prune, save_whole
from dgpo.runs.stability import Alarm, CollapseDetector, choose_response
from dgpo.runs.stopping import StoppedOnRequestError, stop_requested
from dgpo.runs.stops import CollapseError, NonFiniteError, RunStoppedError

VALIDATION_SCORE = "validation/em"
NUM_CHECKED = 16  # episodes of a step whose log-probs are computed before the rollout's are trusted for the others


class TooManyFailedEpisodesError(RunStoppedError):
    """More episodes failed than `retriever.max_failed_share` allows; the run was saved and can resume."""


@register_trainer(TRAINER_NAME)
class DGPOTrainer(TimedTrainer):
    """PPO, GRPO or GKD; algorithm and teacher term as `config.actor_rollout_ref.teacher` describes them."""

    # veRL takes asynchronous paths for every mode that is not called "sync".
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    def __init__(self, config: Any) -> None:
        self.term = config.actor_rollout_ref.teacher
        super().__init__(config)
        self.use_reference_policy = self.term.path is not None or self.term.needs_initial_policy
        self.metrics_path = Path(self.term.metrics_path)
        self.stability = StabilityConfig(**self.term.stability)
        self.detector = CollapseDetector(self.stability, num_questions=config.data.train_batch_size)
        # Of the step in progress:
        self.scores: list[dict[str, float]] = []  # one per episode, in batch order
        self.teacher_log_probs: dict[str, torch.Tensor] = {}  # key -> [T] of the episodes that the teacher scored
        self.dataloader_state: dict[str, Any] | None = None  # before this step's questions were drawn
        self.step_started = 0.0
        self.finished: tuple[KVBatchMeta, dict[str, Any]] | None = None  # the updated batch, and its metrics
        self.unlogged: dict[str, float] | None = None  # the record of a step whose process ended before it was written
        self.validation_scores: dict[int, float] = {}  # step -> exact match

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.term.replay_poll_s  # veRL's 2 s is a floor under every step
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            self.role_worker_mapping.pop(role, None)
            self.mapping.pop(role, None)
        role = Role.ActorRolloutRef if self.use_reference_policy else Role.ActorRollout
        self.role_worker_mapping[role] = ray.remote(TeacherGuidedWorker)
        self.mapping[role] = "global_pool"
        if Role.Critic in self.role_worker_mapping:
            self.role_worker_mapping[Role.Critic] = ray.remote(SeededTrainingWorker)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        start = begin_from(self.metrics_path, self._checkpoint_folder() if self.global_steps else None)
        self.detector.restore(start.records)
        self.validation_scores = {
            int(record["step"]): record[VALIDATION_SCORE] for record in start.records if VALIDATION_SCORE in record
        }
        self.unlogged = start.unlogged
        if start.kl_coef is not None and self.config.algorithm.use_kl_in_reward:
            self.kl_ctrl_in_reward.value = start.kl_coef

    def on_train_begin(self) -> None:
        """Finishes the step after which an earlier process saved and ended, before the next one begins."""
        super().on_train_begin()
        if self.unlogged is None:
            return
        self.global_steps -= 1
        metrics, frequency = self.unlogged, self.config.trainer.test_freq
        is_last = self.global_steps >= self.total_training_steps
        if frequency > 0 and (is_last or self.global_steps % frequency == 0):
            metrics = {**metrics, **self._validate()}
        self._finish_step(metrics)
        self.logger.log(data=metrics, step=self.global_steps)
        self.global_steps += 1

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"{CHECKPOINT}{self.global_steps}"

    def _save_checkpoint(self, dataloader_state: dict[str, Any] | None = None) -> None:
        """Whole or not at all, with the metrics of the step that it follows. Replaces veRL's, which writes in place."""
        folder = self._checkpoint_folder()

        def write_ranks(target: Path) -> list[FileEntries]:
            actor = self.actor_rollout_wg.save_checkpoint(str(target / "actor"))
            critic = self.critic_wg.save_checkpoint(str(target / "critic")) if self.use_critic else []
            return [
                {f"{role}/{name}": entry for name, entry in files.items()}
                for role, ranks in (("actor", actor), ("critic", critic))
                for files in ranks
            ]

        with self.watchdog.during("save"):
            save_whole(
                folder,
                write_ranks,
                step=self.global_steps,
                world_size=self._num_ranks(),
                dataloader=dataloader_state or self.train_dataloader.state_dict(),
                kl_coef=self.kl_ctrl_in_reward.value if self.config.algorithm.use_kl_in_reward else None,
                record=self._record_of_step(),
            )

    def _record_of_step(self) -> dict[str, float] | None:
        """The step's metrics but for validation, which comes after saving; None while the step is in progress."""
        if self.finished is None:
            return None
        batch, metrics = self.finished
        metrics = dict(metrics)
        timing = {"step": time.perf_counter() - self.step_started, **self.timing_raw}
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._complete_metrics(batch, metrics, timing, global_steps=self.global_steps, epoch=epoch)
        return {"step": self.global_steps, **_plain(metrics)}

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self.finished, self.step_started = None, time.perf_counter()
        batch = super().step(metrics, timing_raw)
        self.finished = batch, metrics
        return batch

    def on_validate_begin(self) -> None:
        """A validated step is a saved one too, so that the best can be kept."""
        super().on_validate_begin()
        if self.term.keep_best:
            self._save_now()

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        metrics[VALIDATION_SCORE] = self.validation_score
        return metrics

    def _val_metrics_update(self, data_sources: Any, uids: Any, infos: dict[str, list], *args: Any, **kwargs: Any):
        self.validation_score = float(np.mean(infos["em"]))  # over all questions, whatever set they are of
        return super()._val_metrics_update(data_sources, uids, infos, *args, **kwargs)

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Questions with ids made of step and row, so that a batch has one order whatever finishes first."""
        self.dataloader_state = self.train_dataloader.state_dict()
        batch = super()._fetch_one_gen_batch()
        for row in range(len(batch)):
            batch["uid"][row] = f"{self.global_steps:07d}-{row:06d}"
        return batch

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        batch.reorder(sorted(range(len(batch)), key=lambda index: batch.keys[index]))
        batch = super()._balance_batch(batch, metrics, **kwargs)
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        self.scores = [extra["reward_extra_info"] for extra in fields["extra_fields"]]
        self.episode_spans = {
            key: extra["spans"] for key, extra in zip(batch.keys, fields["extra_fields"], strict=True)
        }
        self._stop_on_failed_episodes([extra["failure"] for extra in fields["extra_fields"] if extra.get("failure")])
        return batch

    def _stop_on_failed_episodes(self, failures: list[str]) -> None:
        """Failed episodes take no part in the update; too many of them are no accident."""
        share = len(failures) / len(self.scores)
        if share <= self.term.max_failed_share:
            return
        self._save_before_step()
        saved = f"Saved after step {self.global_steps}" if self.global_steps > 0 else "No step was made yet"
        raise TooManyFailedEpisodesError(
            f"{share:.0%} of this step's episodes failed (retriever.max_failed_share={self.term.max_failed_share}): "
            f"the first {failures[0]}. {saved}; continue with resume=true"
        )

    def _save_before_step(self) -> None:
        """Also makes that the present step; 0 leaves nothing to save."""
        self.global_steps -= 1
        if self.global_steps > 0 and not self._is_saved():
            self._save_checkpoint(self.dataloader_state)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Of every episode, or of a sample where that says what the rollout says."""
        tolerance = self.term.reuse_log_probs_within
        if tolerance is None:
            return super()._compute_old_log_prob(batch, metrics)
        num_ranks = self._num_ranks()
        num_checked = min(len(batch), -(-NUM_CHECKED // num_ranks) * num_ranks)
        checked = batch.select_keys(batch.keys[:num_checked])
        checked.extra_info["use_dynamic_bsz"] = True  # its size divides by nothing in particular
        super()._compute_old_log_prob(checked, metrics)
        del checked.extra_info["use_dynamic_bsz"]  # it is the whole batch's too
        difference = self._log_prob_difference(checked)
        reused = difference <= tolerance
        metrics["rollout/log_probs_reused"] = float(reused)
        if not reused:
            return super()._compute_old_log_prob(batch, metrics)
        metrics["rollout/log_prob_diff_max"] = difference
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rollout_log_probs"])
        data["old_log_probs"] = data.pop("rollout_log_probs")
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)
        return batch

    def _log_prob_difference(self, batch: KVBatchMeta) -> float:
        fields = ["rollout_log_probs", "old_log_probs", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        rollout, trainer, mask = (data.to_padded_tensor()[name] for name in fields)
        return log_prob_disagreement(rollout, trainer, mask)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Lets the initial policy score every episode where its penalty is on, and the teacher only chosen ones."""
        if self.term.needs_initial_policy:
            batch = super()._compute_ref_log_prob(batch, metrics)
        self.teacher_log_probs = {}
        if self.term.path is None:
            return batch
        correct = torch.tensor([score["em"] for score in self.scores])
        gate = compute_gate(correct, self.term.gate)
        scored = torch.zeros(len(gate), dtype=torch.bool) if self.term.form == "exact" else gate.bool()
        monitored = choose_monitored(
            correct, already=scored, num_monitored=self.term.num_monitored, multiple=self._num_ranks()
        )
        keys = [batch.keys[index] for index in torch.nonzero(scored | monitored)[:, 0].tolist()]
        metrics["teacher/num_scored"] = len(keys)
        metrics["teacher/num_monitored"] = int(monitored.sum())
        if keys:
            with marked_timer("teacher", self.timing_raw):
                self._score_by_teacher(batch.select_keys(keys))
        if self.term.form == "exact":
            tq.kv_batch_put(
                keys=batch.keys,
                partition_id=batch.partition_id,
                fields=TensorDict({"teacher_gate": gate.float()}, batch_size=len(batch)),
            )
        return batch

    def _score_by_teacher(self, chosen: KVBatchMeta) -> None:
        chosen.extra_info.update(
            calculate_entropy=False,
            compute_loss=False,
            temperature=self.config.actor_rollout_ref.rollout.temperature,
        )
        self.actor_rollout_wg.compute_teacher_log_prob(chosen)
        data = tq.kv_batch_get(
            keys=chosen.keys, partition_id=chosen.partition_id, select_fields=["log_probs", "response_mask"]
        )
        rows = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
        self.teacher_log_probs = dict(zip(chosen.keys, rows, strict=True))

    def _num_ranks(self) -> int:
        return self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Rewards (task, initial-policy penalty, gated teacher term), then advantages, on policy tokens only."""
        fields = [
            "uid", "response_mask", "rm_scores", "rollout_log_probs", "old_log_probs", "ref_log_prob", "values"
        ]  # fmt: skip
        nested = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        response_mask = nested["response_mask"]
        data = DataProto(batch=nested.to_padded_tensor())
        data.non_tensor_batch["uid"] = np.array(data.batch.pop("uid").tolist(), dtype=object)
        measured = {name: values for name, values in data.batch.items() if name in SOURCES}
        self._check_finite(data, batch.keys, measured)
        if not metrics.get("rollout/log_probs_reused"):
            metrics["rollout/log_prob_diff_max"] = log_prob_disagreement(
                data.batch["rollout_log_probs"], data.batch["old_log_probs"], data.batch["response_mask"]
            )
        if self.term.needs_initial_policy:
            log_ratio = data.batch["old_log_probs"] - data.batch["ref_log_prob"]
            metrics["actor/kl_to_init"] = sampled_kl(log_ratio, data.batch["response_mask"])
        data.batch["token_level_scores"] = data.batch["rm_scores"] * data.batch["response_mask"]
        data.batch["token_level_rewards"] = data.batch["token_level_scores"]
        if self.config.algorithm.use_kl_in_reward:
            data, kl_metrics = apply_kl_penalty(
                data, kl_ctrl=self.kl_ctrl_in_reward, kl_penalty=self.config.algorithm.kl_penalty
            )
            metrics.update(kl_metrics)
        teacher = self._teacher_inputs(batch, data, metrics)
        if teacher and self.term.form == "reward":
            data.batch["token_level_rewards"] = selective_kl_rewards(data.batch["token_level_rewards"], **teacher)
        self._estimate_advantages(batch, data)
        if teacher and self.term.form == "token":
            data.batch["advantages"] = selective_kl_advantages(data.batch["advantages"], **teacher)
        made = ("token_level_rewards", "advantages", "returns")
        self._check_finite(data, batch.keys, {name: data.batch[name] for name in made})
        self._log_episodes(batch)
        output = {name: response_to_nested(data.batch[name], response_mask) for name in made}
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch))
        )

    def _log_episodes(self, batch: KVBatchMeta) -> None:
        log = EpisodeLog(
            self.metrics_path.parent,
            self.tokenizer,
            every=self.term.log_episodes_every,
            num_episodes=self.term.num_logged_episodes,
        )
        log.write(
            self.global_steps,
            batch.keys,
            scores=self.scores,
            teacher_log_probs=self.teacher_log_probs,
            fetch=lambda keys: tq.kv_batch_get(
                keys=keys, partition_id=batch.partition_id, select_fields=list(LOGGED_FIELDS)
            ),
        )

    def _estimate_advantages(self, batch: KVBatchMeta, data: DataProto) -> None:
        """Adds `advantages` and `returns`: GAE (ppo), group-relative (grpo), or none at all (gkd: no task reward)."""
        rewards, mask = data.batch["token_level_rewards"], data.batch["response_mask"]
        if self.term.algorithm == "ppo":
            compute_advantage_for_multi_trajectories(
                data,
                batch_keys=batch.keys,
                adv_estimator=self.config.algorithm.adv_estimator,
                gamma=self.config.algorithm.gamma,
                lam=self.config.algorithm.lam,
                config=self.config.algorithm,
            )
            return
        if self.term.algorithm == "grpo":
            advantages = group_relative_advantages(
                rewards, response_mask=mask, groups=data.non_tensor_batch["uid"].tolist()
            )
        else:
            advantages = torch.zeros_like(rewards)
        data.batch["advantages"] = data.batch["returns"] = advantages

    def _teacher_inputs(self, batch: KVBatchMeta, data: DataProto, metrics: dict) -> dict[str, Any]:
        """What the sampled forms of the teacher term read; empty without a teacher. Logs the measured KL."""
        if self.term.path is None:
            return {}
        correct = torch.tensor([score["em"] for score in self.scores])
        gate = compute_gate(correct, self.term.gate)
        metrics["teacher/gate_fraction"] = gate.float().mean().item()
        student = data.batch["old_log_probs"]
        teacher = student.clone()  # the difference is 0 where the teacher was not asked
        for row, key in enumerate(batch.keys):
            if key in self.teacher_log_probs:
                values = self.teacher_log_probs[key]
                teacher[row, : len(values)] = values
        self._check_finite(data, batch.keys, {"teacher_log_probs": teacher})
        metrics.update(
            teacher_kl_metrics(
                student - teacher,
                response_mask=data.batch["response_mask"],
                correct=correct,
                scored=torch.tensor([key in self.teacher_log_probs for key in batch.keys]),
            )
        )
        return {
            "student_log_probs": student,
            "teacher_log_probs": teacher,
            "response_mask": data.batch["response_mask"],
            "gate": gate,
            "kl_coef": self.term.coef,
        }

    def _check_finite(self, data: DataProto, episode_ids: list[str], tensors: dict[str, torch.Tensor]) -> None:
        """Stops the run, or sends it back where an earlier checkpoint may be sound, before anything is updated."""
        try:
            check_finite(tensors, response_mask=data.batch["response_mask"], episode_ids=episode_ids)
        except NonFiniteError as error:
            if self._response() == "roll_back" and error.tensor in FROM_TRAINED_WEIGHTS:
                raise CollapseError(str(error), self.global_steps) from error
            raise

    def _response(self, *, first_of_run: bool = False) -> str:
        return choose_response(
            self.stability.action, rollbacks_left=self.term.rollbacks_left, first_of_run=first_of_run
        )

    def _respond(self, alarms: list[Alarm], metrics: dict) -> None:
        """Warns, saves, stops, or asks for a rollback, as `train.stability.action` says."""
        folder = self.metrics_path.parent
        response = self._response(first_of_run=report_alarms(alarms, folder))
        first_step = min(alarm.first_step for alarm in alarms)
        if response in ("stop", "roll_back"):
            self.logger.log(data=metrics, step=self.global_steps)  # veRL would have done so after this
        if response == "roll_back":
            raise CollapseError(str(alarms[0]), first_step)
        if response in ("stop", "save"):
            keep_last_good(folder, first_step)
            self._save_now()
        if response == "stop":
            raise RunStoppedError(
                f"{alarms[0]}. Saved after step {self.global_steps}; resume=true goes on all the same"
            )

    def _is_saved(self) -> bool:
        return (self._checkpoint_folder() / MANIFEST).exists()

    def _save_now(self) -> None:
        """Between two steps, where this one is not saved yet."""
        if self._is_saved():
            return
        self.checkpoint_manager.sleep_replicas()  # as at veRL's own time of saving: the engine gives its memory back
        self._save_checkpoint()
        self.checkpoint_manager.update_weights(self.global_steps)

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, **kwargs: Any) -> None:
        with marked_timer("record", timing_raw):
            self._complete_metrics(batch, metrics, timing_raw, **kwargs)
            self._finish_step(metrics)
        if self.term.timeline:
            self._write_timeline()
        self._stop_on_request(metrics)

    def _stop_on_request(self, metrics: dict) -> None:
        """Between two steps; after the last one there is nothing to stop."""
        if self.global_steps >= self.total_training_steps or not stop_requested(self.metrics_path.parent):
            return
        self.logger.log(data=metrics, step=self.global_steps)  # veRL would have done so after this
        self._save_now()
        raise StoppedOnRequestError(
            f"stopped on request, saved after step {self.global_steps} of {self.total_training_steps}; "
            "resume=true continues"
        )

    def _complete_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **kwargs)
        metrics.update(episode_metrics(self.scores, max_response_tokens=self.config.data.max_response_length))
        lengths = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        mask = lengths["response_mask"].values().float()
        metrics["episode/trained_token_share"] = mask.mean().item()

    def _finish_step(self, metrics: dict[str, Any]) -> None:
        """The record of the step, alarms, and rotation of checkpoints; the last thing that is done for a step."""
        record = {**_plain(metrics), "step": self.global_steps}
        append_record(self.metrics_path, record)
        if VALIDATION_SCORE in record:
            self.validation_scores[self.global_steps] = record[VALIDATION_SCORE]
        prune(
            Path(self.config.trainer.default_local_dir),
            self.validation_scores,
            keep_last=self.term.keep_last,
            keep_best=self.term.keep_best,
            keep=self.term.keep_steps,
        )
        alarms = self.detector.observe(record)
        if alarms:
            self._respond(alarms, metrics)


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers only, as Python floats: what JSON can hold."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float | np.number) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    }
