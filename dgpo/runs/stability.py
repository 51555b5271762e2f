"""The collapse detector: per-step metrics in, alarms out. No engine, no files.

Its whole state is a function of the metrics seen so far, so that a resumed run rebuilds it from `metrics.jsonl`.
What the metrics mean and how the rules were chosen: docs/stability.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median

from dgpo.config.schema import StabilityConfig

Record = Mapping[str, float]

# Metrics that are finite in every sound step. Others may be NaN where they are undefined (a correlation of constants).
FINITE_PREFIXES = ("actor/", "critic/", "teacher/", "episode/")
TEACHER_KL_METRICS = ("teacher/kl_failed", "teacher/kl_all")
GRAD_METRICS = ("actor/grad_norm", "critic/grad_norm")
# A fall of a rate counts if it is beyond this many standard errors of two moving averages. Not 3: the best average of
# 1000 steps is a lucky one, and in simulated steady runs 3 gave false alarms in most runs of few questions, 4 in none.
NOISE_SIGMAS = 4.0

ADVICE = {
    "non_finite": "the last finite checkpoint is sound; lower train.actor_learning_rate or train.critic_learning_rate",
    "entropy_low": "the policy writes almost the same tokens every time; raise train.entropy_coef, or lower "
    "train.actor_learning_rate",
    "entropy_high": "the policy writes almost at random; lower train.actor_learning_rate or train.entropy_coef",
    "em_fall": "go back to the checkpoint before the fall; lower train.actor_learning_rate, or raise "
    "train.teacher_term.coef or train.init_kl_coef",
    "answer_fall": "look at the episodes: does it search without end, or lose the format? Go back to the checkpoint "
    "before the fall and lower train.actor_learning_rate",
    "repetition": "the policy loops; lower train.actor_learning_rate, or raise train.init_kl_coef",
    "turn_length": "turns end at episode.max_turn_tokens and not at a tag; lower train.actor_learning_rate, or start "
    "from a cold start",
    "response_length": "episodes fill episode.max_response_tokens; raise it if they are sound, else lower "
    "train.actor_learning_rate",
    "kl": "the policy runs away; lower train.actor_learning_rate, or raise train.teacher_term.coef or "
    "train.init_kl_coef",
    "gradient": "lower the learning rate or train.max_grad_norm, and look at this step's episodes",
}


@dataclass(frozen=True)
class Alarm:
    """A broken rule.

    Attributes:
        value, threshold: of `metric` at `step`, and the limit it broke.
        first_step: the first step that may have been touched by the trouble.
    """

    rule: str
    metric: str
    value: float
    threshold: float
    step: int
    first_step: int

    @property
    def advice(self) -> str:
        return ADVICE[self.rule]

    def __str__(self) -> str:
        return (
            f"{self.rule}: {self.metric}={self.value:.4g} at step {self.step}, limit {self.threshold:.4g} (first sign "
            f"at step {self.first_step}): {self.advice}"
        )


@dataclass(frozen=True)
class _Finding:
    """One rule, looked at in one step."""

    rule: str
    metric: str
    value: float
    threshold: float
    broken: bool
    lag: int = 0  # steps before this one that the value also covers


@dataclass
class _Streak:
    first_step: int
    length: int = 0


class CollapseDetector:
    """Rules over the metrics of one run. Feed it every step in order.

    Args:
        settings: the thresholds.
        num_questions: per step; the noise of a rate follows from it.
    """

    def __init__(self, settings: StabilityConfig, *, num_questions: int) -> None:
        self.settings = settings
        self.num_questions = num_questions
        self._history: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}  # metric -> the best of its moving averages
        self._streaks: dict[tuple[str, str], _Streak] = {}

    def observe(self, record: Record) -> list[Alarm]:
        """The alarms that this step raises. A rule that stays broken raises one; it can raise the next once it was met.

        Args:
            record: a line of `metrics.jsonl`: `step` and metrics by name. A rule whose metric is missing is skipped.
        """
        step = int(record["step"])
        alarms = []
        for finding in self._findings(record):
            key = (finding.rule, finding.metric)
            if not finding.broken:
                self._streaks.pop(key, None)
                continue
            streak = self._streaks.setdefault(key, _Streak(max(1, step - finding.lag)))
            streak.length += 1
            if streak.length == (1 if finding.rule == "non_finite" else self.settings.patience):
                alarms.append(
                    Alarm(finding.rule, finding.metric, finding.value, finding.threshold, step, streak.first_step)
                )
        for name, value in record.items():
            if math.isfinite(value):
                self._history.setdefault(name, []).append(value)
        return alarms

    def restore(self, records: Iterable[Record]) -> None:
        """Takes in the steps of an earlier process; their alarms were raised there."""
        for record in records:
            self.observe(record)

    def _findings(self, record: Record) -> Iterator[_Finding]:
        limits = self.settings
        for name, value in record.items():
            if name.startswith(FINITE_PREFIXES):
                yield _Finding("non_finite", name, value, math.inf, not math.isfinite(value))
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        if "actor/entropy" in finite:
            yield from self._entropy(finite["actor/entropy"])
        yield from self._fall("em_fall", "episode/em", finite, limits.min_em_share)
        yield from self._fall("answer_fall", "episode/answered", finite, limits.min_answered_share)
        yield from _above("repetition", "episode/repeated_token_share", finite, limits.max_repeated_token_share)
        yield from _above("turn_length", "episode/truncated_turn_share", finite, limits.max_truncated_turn_share)
        yield from _above("response_length", "episode/response_fill", finite, limits.max_response_fill)
        yield from _above("kl", "actor/kl_to_init", finite, limits.max_kl)  # 0 at the start by its nature
        for name in TEACHER_KL_METRICS:
            early = self._early(name)
            if early is not None:
                yield from _above("kl", name, finite, max(limits.max_kl, limits.max_kl_ratio * early))
        for name in GRAD_METRICS:
            history = self._history.get(name, [])
            if len(history) >= limits.window:
                yield from _above("gradient", name, finite, limits.max_grad_norm_ratio * median(history))

    def _entropy(self, value: float) -> Iterator[_Finding]:
        limits, name = self.settings, "actor/entropy"
        yield _Finding("entropy_low", name, value, limits.min_entropy, value < limits.min_entropy)
        early = self._early(name)
        if early is not None:
            ceiling = limits.max_entropy_ratio * early
            yield _Finding("entropy_high", name, value, ceiling, value > ceiling)

    def _early(self, name: str) -> float | None:
        """Mean of the metric's first `window` values; None until they are there."""
        first = self._history.get(name, [])[: self.settings.window]
        return fmean(first) if len(first) == self.settings.window else None

    def _fall(self, rule: str, name: str, finite: Record, min_share: float) -> Iterator[_Finding]:
        """A rate whose moving average fell below a share of its best one, beyond what sampling explains."""
        if name not in finite:
            return
        window = self.settings.window
        recent = [*self._history.get(name, []), finite[name]][-window:]
        if len(recent) < window:
            return
        mean = fmean(recent)
        best = self._best[name] = max(mean, self._best.get(name, mean))
        noise = math.sqrt(2 * best * (1 - best) / (window * self.num_questions))
        floor = min(min_share * best, best - NOISE_SIGMAS * noise)
        yield _Finding(rule, name, mean, floor, mean < floor, lag=window - 1)


def choose_response(action: str, *, rollbacks_left: int, first_of_run: bool) -> str:
    """What to do about alarms.

    Args:
        action: `train.stability.action`.
        rollbacks_left: how many the run may still make.
        first_of_run: whether no step before raised one.

    Returns:
        `go_on`; `save`, then go on; `stop`, saved; or `roll_back`.
    """
    if action == "rollback" and rollbacks_left > 0:
        return "roll_back"
    if action == "warn":
        return "save" if first_of_run else "go_on"
    return "stop"


def _above(rule: str, name: str, finite: Record, limit: float) -> Iterator[_Finding]:
    if name in finite:
        yield _Finding(rule, name, finite[name], limit, finite[name] > limit)
