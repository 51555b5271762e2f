"""What the trainer and the actor's worker are told besides veRL's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgpo.config.methods import has_teacher, teacher_coef
from dgpo.config.schema import Config, PhaseLimitsConfig, StabilityConfig
from dgpo.runs.rollback import num_rollbacks, num_to_keep


@dataclass(frozen=True)
class TeacherSettings:
    """The frozen models beside the actor: the teacher, and the initial policy.

    Attributes:
        path: a model folder or a name on the hub; None without a teacher.
        form: a name of `TEACHER_FORMS`.
        gate: a name of `GATES`.
        coef: the term's weight.
        num_monitored: correct, and failed, episodes per step that are scored for monitoring only.
        needs_initial_policy: its KL is measured, or a penalty in the reward or the loss.
        mini_batch_size: episodes of an update of the actor.
        seed: of the coins that a gate may draw.
    """

    path: str | None
    trust_remote_code: bool
    form: str
    gate: str
    coef: float
    num_monitored: int
    needs_initial_policy: bool
    mini_batch_size: int
    seed: int


@dataclass(frozen=True)
class TrainerSettings:
    """What `dgpo.rl.loop` does, besides veRL's keys.

    Attributes:
        folder: of the stage: metrics, alarms, timeline, episodes.
        algorithm: a name of `ALGORITHMS`.
        reuse_log_probs_within: nats by which the rollout's log-probs may differ from the trainer's to be reused; None:
            the trainer's are computed always.
        max_failed_share: a step with a larger share of failed episodes stops the run.
        keep_last, keep_best: checkpoints that rotation leaves; `keep_best` of those with a validation score.
        keep_steps: steps whose checkpoints it leaves too.
        rollbacks_left: that the run may still make.
        limits: phase of the watchdog -> the longest that it may take, in seconds.
        replay_poll_s: between looks for finished episodes.
        log_episodes_every: steps between samples of episodes; None writes none.
        timeline: writes when each part of a step was.
    """

    folder: Path
    algorithm: str
    teacher: TeacherSettings
    reuse_log_probs_within: float | None
    max_failed_share: float
    keep_last: int
    keep_best: int
    keep_steps: tuple[int, ...]
    stability: StabilityConfig
    rollbacks_left: int
    limits: dict[str, float]
    replay_poll_s: float
    log_episodes_every: int | None
    num_logged_episodes: int
    timeline: bool


def trainer_settings(config: Config, folder: Path) -> TrainerSettings:
    """The settings of a checked configuration, for the stage in `folder`."""
    train = config.train
    return TrainerSettings(
        folder=folder.resolve(),
        algorithm=train.algorithm,
        teacher=teacher_settings(config),
        reuse_log_probs_within=train.reuse_log_probs_within,
        max_failed_share=config.retriever.max_failed_share,
        keep_last=num_to_keep(config),
        keep_best=train.keep_best if config.data.validation_file else 0,
        keep_steps=tuple(train.keep_steps),
        stability=train.stability,
        rollbacks_left=train.stability.max_rollbacks - num_rollbacks(folder),
        limits=_phase_limits(train.limits),
        replay_poll_s=config.hardware.replay_poll_s,
        log_episodes_every=train.log_episodes_every,
        num_logged_episodes=train.num_logged_episodes,
        timeline=train.timeline,
    )


def teacher_settings(config: Config) -> TeacherSettings:
    """The part that the actor's worker reads too."""
    term = config.train.teacher_term
    return TeacherSettings(
        path=config.teacher.path if has_teacher(config, "train") else None,
        trust_remote_code=config.teacher.trust_remote_code,
        form=term.form,
        gate=term.gate,
        coef=teacher_coef(term),
        num_monitored=term.num_monitored,
        needs_initial_policy=config.train.init_kl_coef > 0 or config.train.stability.measure_init_kl,
        mini_batch_size=config.train.mini_batch_size,
        seed=config.seed,
    )


def _phase_limits(limits: PhaseLimitsConfig) -> dict[str, float]:
    """In the watchdog's words."""
    return {
        "start": limits.start_s,
        "rollout": limits.rollout_s,
        "update": limits.update_s,
        "sync": limits.sync_s,
        "save": limits.save_s,
        "validate": limits.validate_s,
    }
