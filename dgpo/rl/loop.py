"""The training loop: `DGPOTrainer.step` is one step of DGPO, from its questions to its record.

veRL's synchronous trainer sets up workers, engines and data, and computes log-probs, values and updates; when that
happens, and what becomes of it, is decided here. The mathematics is in `dgpo.algorithms`: `selective_kl` (gates and
forms of the teacher term), `advantages` (PPO, GRPO, GKD) and `chunked_head`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.utils.seqlen_balancing import log_seqlen_unbalance
from verl.utils.skip import SkipManager
from verl.utils.tracking import Tracking, ValidationGenerationsLogger
from verl.workers.utils.padding import response_to_nested

from dgpo.algorithms.advantages import ALGORITHMS
from dgpo.errors import CollapseError, NonFiniteError, RunStoppedError, StoppedOnRequestError
from dgpo.files import append_jsonl
from dgpo.rl.episode_log import FIELDS as LOGGED_FIELDS
from dgpo.rl.episode_log import EpisodeLog
from dgpo.rl.metrics import episode_metrics, log_prob_disagreement, sampled_kl
from dgpo.rl.settings import TrainerSettings
from dgpo.rl.teacher import Teacher
from dgpo.rl.terminal import step_line
from dgpo.rl.timeline import FILE as TIMELINE
from dgpo.rl.timeline import TRAINER, write_spans
from dgpo.rl.updates import balanced_over_ranks
from dgpo.rl.worker import SeededTrainingWorker, TeacherGuidedWorker
from dgpo.runs.alarms import report_alarms
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.checkpoints import FileEntries
from dgpo.runs.guards import FROM_TRAINED_WEIGHTS, SOURCES, check_finite
from dgpo.runs.plain_values import load_plain
from dgpo.runs.rollback import CHECKPOINT, METRICS, keep_last_good
from dgpo.runs.run_state import DATALOADER, Record, prune, rewind_to, save_checkpoint
from dgpo.runs.stability import CollapseDetector, choose_response
from dgpo.runs.stopping import stop_requested
from dgpo.runs.watchdog import Watchdog

VALIDATION_SCORE = "validation/em"
STEPS_AVERAGED = 10  # from which the time left is estimated
NUM_CHECKED = 16  # episodes of a step whose log-probs are computed before the rollout's are trusted for the others


@dataclass(frozen=True)
class Played:
    """What the agent loop says of a step's episodes, in batch order."""

    keys: list[str]
    scores: list[dict[str, float]]
    spans: dict[str, list[list[Any]]]  # episode -> (name, start, end)
    failures: list[str]  # why episodes could not be played or scored


class DGPOTrainer(PPOTrainerSync):
    """PPO, GRPO or GKD with a teacher on the episodes that the student got wrong.

    Args:
        config: veRL's, from `dgpo.rl.verl_config`.
        settings: everything else.
        watchdog: told which phase the trainer is in and whom it depends on.
    """

    def __init__(self, config: Any, settings: TrainerSettings, watchdog: Watchdog) -> None:
        self.settings, self.watchdog = settings, watchdog
        super().__init__(config)
        self.num_ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
        self.algorithm = ALGORITHMS[settings.algorithm]
        self.teacher = Teacher(
            settings.teacher, num_ranks=self.num_ranks, temperature=config.actor_rollout_ref.rollout.temperature
        )
        self.use_reference_policy = self.teacher.is_there or settings.teacher.needs_initial_policy
        self.detector = CollapseDetector(settings.stability, num_questions=config.data.train_batch_size)
        self.metrics_path = settings.folder / METRICS
        self.unrecorded: Record | None = None  # the record of a step whose process ended before it was written
        self.validation_scores: dict[int, float] = {}  # step -> exact match
        self.questions_before: dict[str, Any] | None = None  # the dataloader's state before it drew a step's questions
        self.started = 0.0  # when the step in progress began
        self.seconds: dict[str, float] = {}  # part of the step in progress -> its time
        self.step_seconds: list[float] = []  # one per step that this process took
        self.spans: list[tuple[str, float, float]] = []  # when each part began and ended

    def fit(self, agent_loop_manager: Any) -> None:
        """Trains to the last step. veRL's own is not called: `_begin` does what that does before its steps."""
        self._begin(agent_loop_manager)
        self._complete_unrecorded_step()
        while self.global_steps < self.total_training_steps:
            self.global_steps += 1
            SkipManager.set_step(self.global_steps)
            self.step()
        self._shutdown_dump_executor()

    def step(self) -> None:
        """One step. `batch` names the episodes, whose tensors are in veRL's store; `metrics` gathers what is measured.

        Raises:
            RunStoppedError: too many episodes failed, a number is not finite, or an alarm says so. It is saved.
            StoppedOnRequestError: the run was asked to stop, and is saved.
        """
        self.seconds, self.spans, self.started = {}, [], time.perf_counter()
        metrics: dict[str, Any] = {}
        teacher_log_probs: dict[str, torch.Tensor] = {}
        with self.phase("step"):
            self._start_profiling()
            batch = self._play(metrics)
            played = self._read_played(batch)
            self._stop_on_failures(played)

            with self.phase("old_log_prob"):
                batch = self._old_log_probs(batch, metrics)
            if self.use_reference_policy:
                with self.phase("ref"):
                    if self.settings.teacher.needs_initial_policy:
                        batch = self._compute_ref_log_prob(batch, metrics)
                    if self.teacher.is_there:
                        teacher_log_probs = self._teacher_log_probs(batch, played, metrics)
            if self.use_critic:
                with self.phase("values"):
                    batch = self._compute_values(batch, metrics)
            with self.phase("adv"):
                batch = self._compute_advantages(batch, played, teacher_log_probs, metrics)

            if self.use_critic:
                with self.phase("update_critic"):
                    batch = self._update_critic(batch, metrics)
            if self.config.trainer.critic_warmup <= self.global_steps:
                with self.phase("update_actor"):
                    batch = self._update_actor(batch, metrics)
            self._stop_profiling()

            if self._is_save_due():  # the engine is still asleep: it wakes once, with the new weights
                with self.phase("save_checkpoint", limit="save"):
                    self._save(_plain(self._completed(batch, played, metrics)))
            with self.phase("update_weights", limit="sync"):
                self.checkpoint_manager.update_weights(self.global_steps)

        if self._is_validation_due():
            with self.phase("testing", limit="validate"):
                metrics |= self._validate()
        with self.phase("record"):
            record = self._record(self._completed(batch, played, metrics))
            self._clear(batch)
        if self.settings.timeline:
            write_spans(self.settings.folder / TIMELINE, self.global_steps, {TRAINER: self.spans, **played.spans})
        self._respond_to_alarms(record)
        self._stop_on_request(record)

    @contextmanager
    def phase(self, name: str, *, limit: str | None = None) -> Iterator[None]:
        """A part of the step: timed as `timing_s/<name>`, filed as a span, and bounded by the watchdog.

        Args:
            limit: which of `train.limits` bounds it; None: that of what encloses it.
        """
        started = time.time()
        with self.watchdog.during(limit) if limit else nullcontext(), marked_timer(name, self.seconds):
            yield
        self.spans.append((name, started, time.time()))

    # ---- The parts of a step, in its order.

    def _play(self, metrics: dict[str, Any]) -> KVBatchMeta:
        """The student's episodes over this step's questions, balanced over ranks; their order is none of chance."""
        with self.watchdog.during("rollout"):
            with self.phase("prepare"):
                self.prepare_step()
            with self.phase("gen"):
                batch, sampled = self.replay_buffer.sample(
                    global_steps=self.global_steps,
                    partition_id="train",
                    batch_size=self.config.data.train_batch_size,
                )
                batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
                self._put_engine_to_sleep()
        metrics.update(sampled)
        with self.phase("balance"):
            batch.reorder(sorted(range(len(batch)), key=lambda index: batch.keys[index]))
            return self._balance(batch, metrics)

    def _balance(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        lengths = [tag["seq_len"] for tag in batch.tags]
        size = self.settings.teacher.mini_batch_size
        shares = balanced_over_ranks(lengths, num_ranks=self._num_data_parallel_ranks, mini_batch_size=size)
        batch.reorder([index for share in shares for index in share])
        metrics.update(log_seqlen_unbalance(lengths, shares, prefix="global_seqlen"))
        return batch

    @cached_property
    def _num_data_parallel_ranks(self) -> int:
        return max(self.actor_rollout_wg._query_dispatch_info("actor")) + 1

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Questions with ids made of step and row, so that a batch has one order."""
        self.questions_before = self.train_dataloader.state_dict()
        batch = super()._fetch_one_gen_batch()
        for row in range(len(batch)):
            batch["uid"][row] = f"{self.global_steps:07d}-{row:06d}"
        return batch

    def _put_engine_to_sleep(self) -> None:
        """The engine gives its memory back. A dead one failed its episodes before a fault was looked for."""
        try:
            self.checkpoint_manager.sleep_replicas()
            if self.curr_step_profile:
                self._stop_rollout_profiling()
        except Exception as error:
            if self.watchdog.explain(error) is error:
                raise
            self._stop_on_fault()
            assert self.watchdog.fault is not None
            raise self.watchdog.fault from error

    def _read_played(self, batch: KVBatchMeta) -> Played:
        fields = _get(batch, ["extra_fields"])["extra_fields"]
        return Played(
            keys=batch.keys,
            scores=[extra["reward_extra_info"] for extra in fields],
            spans={key: extra["spans"] for key, extra in zip(batch.keys, fields, strict=True)},
            failures=[extra["failure"] for extra in fields if extra.get("failure")],
        )

    def _stop_on_failures(self, played: Played) -> None:
        """Failed episodes take no part in the update; too many of them are no accident."""
        share, limit = len(played.failures) / len(played.scores), self.settings.max_failed_share
        if share <= limit:
            return
        self._save_before_step()
        saved = f"Saved after step {self.global_steps}" if self.global_steps > 0 else "No step was made yet"
        raise RunStoppedError(
            f"{share:.0%} of this step's episodes failed (retriever.max_failed_share={limit}): "
            f"the first {played.failures[0]}. {saved}; continue with resume=true",
            kind="TooManyFailedEpisodesError",
        )

    def _old_log_probs(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """The student's log-probs of all episodes: computed, or the rollout's where a sample of them agrees."""
        tolerance = self.settings.reuse_log_probs_within
        if tolerance is None:
            return self._compute_old_log_prob(batch, metrics)
        num_checked = min(len(batch), -(-NUM_CHECKED // self.num_ranks) * self.num_ranks)
        checked = batch.select_keys(batch.keys[:num_checked])
        checked.extra_info["use_dynamic_bsz"] = True  # its size divides by nothing in particular
        self._compute_old_log_prob(checked, metrics)
        difference = self._log_prob_difference(checked)
        reused = difference["rollout/log_prob_diff_max"] <= tolerance
        metrics["rollout/log_probs_reused"] = float(reused)
        if not reused:
            return self._compute_old_log_prob(batch, metrics)
        metrics.update(difference)
        data = _get(batch, ["rollout_log_probs"])
        data["old_log_probs"] = data.pop("rollout_log_probs")
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)
        return batch

    def _log_prob_difference(self, batch: KVBatchMeta) -> dict[str, float]:
        fields = ["rollout_log_probs", "old_log_probs", "response_mask"]
        data = _get(batch, fields)
        rollout, trainer, mask = (data.to_padded_tensor()[name] for name in fields)
        return log_prob_disagreement(rollout, trainer, mask)

    def _teacher_log_probs(
        self, batch: KVBatchMeta, played: Played, metrics: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The teacher's, of the episodes that it is to score: episode -> [T] in nats."""
        chosen = self.teacher.choose(played.keys, played.scores, metrics)
        log_probs = {}
        if chosen:
            with self.phase("teacher"):
                log_probs = self.teacher.score(batch.select_keys(chosen), self.actor_rollout_wg)
        if self.teacher.form.in_loss:
            self.teacher.send_gate(batch, played.scores)
        return log_probs

    def _compute_advantages(
        self,
        batch: KVBatchMeta,
        played: Played,
        teacher_log_probs: Mapping[str, torch.Tensor],
        metrics: dict[str, Any],
    ) -> KVBatchMeta:
        """Rewards (task, initial-policy penalty, teacher term), then advantages; all finite before an update."""
        nested = _get(
            batch,
            ["uid", "response_mask", "rm_scores", "rollout_log_probs", "old_log_probs", "ref_log_prob", "values"],
        )
        given = nested.to_padded_tensor()  # [B, T] each
        groups, mask = given.pop("uid").tolist(), given["response_mask"]
        self._measure(given, metrics)
        form = self.teacher.form
        term: dict[str, Any] = {}
        if self.teacher.is_there:
            term = self.teacher.inputs(
                played.keys,
                played.scores,
                teacher_log_probs,
                student_log_probs=given["old_log_probs"],
                response_mask=mask,
                metrics=metrics,
            )

        rewards = form.in_rewards(self._task_rewards(given, metrics), **term)
        advantages, returns = self.algorithm.estimate(
            rewards,
            response_mask=mask,
            values=given["values"] if self.use_critic else None,
            groups=groups,
            gamma=self.config.algorithm.gamma,
            lam=self.config.algorithm.lam,
        )
        advantages = form.in_advantages(advantages, **term)

        made = {"token_level_rewards": rewards, "advantages": advantages, "returns": returns}
        known = {**dict(given.items()), **term, **made}
        self._check_finite({name: known[name] for name in SOURCES if name in known}, mask, played.keys)
        self.episode_log.write(
            self.global_steps,
            played.keys,
            scores=played.scores,
            teacher_log_probs=teacher_log_probs,
            fetch=lambda keys: _get(batch, list(LOGGED_FIELDS), keys=keys),
        )
        output = {name: response_to_nested(values, nested["response_mask"]) for name, values in made.items()}
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch))
        )

    def _measure(self, given: Mapping[str, torch.Tensor], metrics: dict[str, Any]) -> None:
        """How far the student is from the rollout's copy of it, and from the initial policy."""
        mask = given["response_mask"]
        if not metrics.get("rollout/log_probs_reused"):
            metrics.update(log_prob_disagreement(given["rollout_log_probs"], given["old_log_probs"], mask))
        if self.settings.teacher.needs_initial_policy:
            metrics["actor/kl_to_init"] = sampled_kl(given["old_log_probs"] - given["ref_log_prob"], mask)

    def _task_rewards(self, given: TensorDict, metrics: dict[str, Any]) -> torch.Tensor:
        """[B, T]: the episode's reward on its last token, minus the penalty to the initial policy if there is one."""
        scores = given["rm_scores"] * given["response_mask"]
        if not self.config.algorithm.use_kl_in_reward:
            return scores
        data = DataProto(batch=given.select("response_mask", "old_log_probs", "ref_log_prob"))
        data.batch["token_level_scores"] = scores
        data, measured = apply_kl_penalty(
            data, kl_ctrl=self.kl_ctrl_in_reward, kl_penalty=self.config.algorithm.kl_penalty
        )
        metrics.update(measured)
        return data.batch["token_level_rewards"]

    def _check_finite(self, tensors: Mapping[str, torch.Tensor], mask: torch.Tensor, episode_ids: list[str]) -> None:
        """Stops the run, or sends it back where an earlier checkpoint may be sound, before anything is updated."""
        try:
            check_finite(tensors, response_mask=mask, episode_ids=episode_ids)
        except NonFiniteError as error:
            if self._response() == "roll_back" and error.tensor in FROM_TRAINED_WEIGHTS:
                raise CollapseError(str(error), self.global_steps) from error
            raise

    def _completed(self, batch: KVBatchMeta, played: Played, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics with veRL's and ours of the whole step so far."""
        completed: dict[str, Any] = _plain(metrics)
        seconds = {"step": time.perf_counter() - self.started, **self.seconds}
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._compute_metrics(batch, completed, seconds, global_steps=self.global_steps, epoch=epoch)
        completed.update(episode_metrics(played.scores, max_response_tokens=self.config.data.max_response_length))
        mask = _get(batch, ["response_mask"])["response_mask"].values().float()
        completed["episode/trained_token_share"] = mask.mean().item()
        return completed

    def _record(self, metrics: dict[str, Any]) -> Record:
        """Writes the step's record and lets rotation delete checkpoints. With it the step is done."""
        record = {**_plain(metrics), "step": self.global_steps}
        append_jsonl(self.metrics_path, [record])
        self.step_seconds.append(record["timing_s/step"])
        step_s = float(np.mean(self.step_seconds[-STEPS_AVERAGED:]))
        print(step_line(record, num_steps=self.total_training_steps, step_s=step_s), flush=True)
        self.logger.log(data=metrics, step=self.global_steps)
        if VALIDATION_SCORE in record:
            self.validation_scores[self.global_steps] = record[VALIDATION_SCORE]
        prune(
            Path(self.config.trainer.default_local_dir),
            self.validation_scores,
            keep_last=self.settings.keep_last,
            keep_best=self.settings.keep_best,
            keep=self.settings.keep_steps,
        )
        return record

    def _clear(self, batch: KVBatchMeta) -> None:
        """Drops the step's episodes from veRL's store."""
        folder = self.config.trainer.get("rollout_data_dir", None)
        if folder:
            self._log_rollout_data(batch, self.seconds, folder)
        tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)

    def _respond_to_alarms(self, record: Record) -> None:
        """Warns, saves, stops, or asks for a rollback, as `train.stability.action` says."""
        alarms = self.detector.observe(record)
        if not alarms:
            return
        response = self._response(first_of_run=report_alarms(alarms, self.settings.folder))
        first_step = min(alarm.first_step for alarm in alarms)
        if response == "roll_back":
            raise CollapseError(str(alarms[0]), first_step)
        if response in ("stop", "save"):
            keep_last_good(self.settings.folder, first_step)
            self._save_after_step(record, goes_on=response == "save")
        if response == "stop":
            raise RunStoppedError(
                f"{alarms[0]}. Saved after step {self.global_steps}; resume=true continues in spite of it"
            )

    def _response(self, *, first_of_run: bool = False) -> str:
        return choose_response(
            self.settings.stability.action, rollbacks_left=self.settings.rollbacks_left, first_of_run=first_of_run
        )

    def _stop_on_request(self, record: Record) -> None:
        """After the last step there is nothing to stop."""
        if self.global_steps >= self.total_training_steps or not stop_requested(self.settings.folder):
            return
        self._save_after_step(record, goes_on=False)
        raise StoppedOnRequestError(
            f"stopped on request, saved after step {self.global_steps} of {self.total_training_steps}; "
            "resume=true continues"
        )

    # ---- Saving, validation, and going on from a checkpoint.

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.global_steps >= self.total_training_steps or self.global_steps % every == 0)

    def _is_validation_due(self) -> bool:
        return self._is_due(self.config.trainer.test_freq)

    def _is_save_due(self) -> bool:
        """A validated step is a saved one too, so that the best can be kept."""
        return self._is_due(self.config.trainer.save_freq) or (
            self.settings.keep_best > 0 and self._is_validation_due()
        )

    def _val_metrics_update(self, data_sources: Any, uids: Any, infos: Any, *args: Any, **kwargs: Any) -> dict:
        """Adds exact match over all questions, whatever set they are of."""
        metrics = super()._val_metrics_update(data_sources, uids, infos, *args, **kwargs)
        return {**metrics, VALIDATION_SCORE: float(np.mean(infos["em"]))}

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"{CHECKPOINT}{self.global_steps}"

    def _save(self, record: Record | None, *, questions: dict[str, Any] | None = None) -> None:
        """Writes the checkpoint after this step whole or not at all.

        Args:
            record: the step's metrics but for validation, which comes after saving; None where they are recorded.
            questions: state of the dataloader; None: the present one.
        """

        def write_ranks(target: Path) -> list[FileEntries]:
            actor = self.actor_rollout_wg.save_checkpoint(str(target / "actor"))
            critic = self.critic_wg.save_checkpoint(str(target / "critic")) if self.use_critic else []
            return [
                {f"{role}/{name}": entry for name, entry in files.items()}
                for role, ranks in (("actor", actor), ("critic", critic))
                for files in ranks
            ]

        save_checkpoint(
            self._checkpoint_folder(),
            write_ranks,
            step=self.global_steps,
            world_size=self.num_ranks,
            dataloader=questions or self.train_dataloader.state_dict(),
            kl_coef=self.kl_ctrl_in_reward.value if self.config.algorithm.use_kl_in_reward else None,
            record=record and {**record, "step": self.global_steps},
        )

    def _is_saved(self) -> bool:
        return (self._checkpoint_folder() / MANIFEST).exists()

    def _save_before_step(self) -> None:
        """Saves the step before the one in progress, and makes it the present one; 0 leaves nothing to save."""
        self.global_steps -= 1
        if self.global_steps > 0 and not self._is_saved():
            with self.watchdog.during("save"):
                self._save(None, questions=self.questions_before)

    def _save_after_step(self, record: Record, *, goes_on: bool) -> None:
        """Between two steps, where this one is not saved yet: the engine sleeps while that is done."""
        if self._is_saved():
            return
        self.checkpoint_manager.sleep_replicas()
        with self.watchdog.during("save"):
            self._save(record)
        if goes_on:
            self.checkpoint_manager.update_weights(self.global_steps)

    def _load_checkpoint(self) -> None:
        if checkpoint := self.config.trainer.resume_from_path:
            load_plain(Path(checkpoint) / DATALOADER)  # veRL unpickles whatever it holds
        super()._load_checkpoint()
        start = rewind_to(self.metrics_path, self._checkpoint_folder() if self.global_steps else None)
        self.detector.restore(start.records)
        self.validation_scores = {
            int(record["step"]): record[VALIDATION_SCORE] for record in start.records if VALIDATION_SCORE in record
        }
        self.unrecorded = start.unrecorded
        if start.kl_coef is not None and self.config.algorithm.use_kl_in_reward:
            self.kl_ctrl_in_reward.value = start.kl_coef

    def _complete_unrecorded_step(self) -> None:
        """Validates and records the step after which an earlier process saved and ended."""
        if self.unrecorded is None:
            return
        metrics = {name: value for name, value in self.unrecorded.items() if name != "step"}
        if self._is_validation_due():
            with self.watchdog.during("validate"):
                metrics |= self._validate()
        self._respond_to_alarms(self._record(metrics))

    # ---- What veRL sets up.

    def _init_resource_pool_mgr(self) -> None:
        """Workers of ours in the place of veRL's."""
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            self.role_worker_mapping.pop(role, None)
            self.mapping.pop(role, None)
        role = Role.ActorRolloutRef if self.use_reference_policy else Role.ActorRollout
        self.role_worker_mapping[role] = ray.remote(TeacherGuidedWorker)
        self.mapping[role] = "global_pool"
        if Role.Critic in self.role_worker_mapping:
            self.role_worker_mapping[Role.Critic] = ray.remote(SeededTrainingWorker)

    def _build_replay_buffer(self) -> Any:
        """Where veRL polls for finished episodes, a fault is looked for too."""
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.settings.replay_poll_s  # veRL's 2 s is a floor under every step
        wait = buffer._wait_for_next_poll

        def wait_unless_fault(*args: Any) -> float:
            self._stop_on_fault()
            return wait(*args)

        buffer._wait_for_next_poll = wait_unless_fault
        return buffer

    def _stop_on_fault(self) -> None:
        """Whatever happens in mid-rollout leaves the weights as they are: they are saved before the run ends."""
        fault = self.watchdog.fault
        if fault is not None and self.watchdog.weights_are_whole:
            self._save_before_step()
            raise fault

    def _begin(self, agent_loop_manager: Any) -> None:
        """What veRL's `fit` does before its steps: loggers, profiler, prompts that were in flight."""
        self.agent_loop_manager = agent_loop_manager
        self._watch_all(agent_loop_manager)
        self.episode_log = EpisodeLog(
            self.settings.folder,
            self.tokenizer,
            every=self.settings.log_episodes_every,
            num_episodes=self.settings.num_logged_episodes,
        )
        SkipManager.init(self.config)
        trainer = self.config.trainer
        names = {"project_name": trainer.project_name, "experiment_name": trainer.experiment_name}
        self.logger = Tracking(
            **names, default_backend=trainer.logger, config=OmegaConf.to_container(self.config, resolve=True)
        )
        self.validation_generations_logger = ValidationGenerationsLogger(**names)
        if trainer.val_before_train:
            self.logger.log(data=self._validate(), step=self.global_steps)
        profiled = self.config.global_profiler.steps or ()
        self.prev_step_profile = self.next_step_profile = False
        self.curr_step_profile = self.global_steps + 1 in profiled
        self._reissue_inflight_prompts()
        self.watchdog.enter("update")

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


def _get(batch: KVBatchMeta, fields: list[str], *, keys: list[str] | None = None) -> TensorDict:
    """The fields that the store has of the batch's episodes: nested tensors, and lists of plain values."""
    return tq.kv_batch_get(keys=keys or batch.keys, partition_id=batch.partition_id, select_fields=fields)


def _plain(metrics: Mapping[str, Any]) -> Record:
    """Numbers only, as Python floats: what JSON can hold."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float | np.number) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    }
