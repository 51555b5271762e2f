"""Scores of finished episodes: one flat record per episode, and their means with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgpo.data.rows import row_golds, row_question
from dgpo.metrics.exact_match import sub_exact_match
from dgpo.metrics.intervals import bootstrap_ci, paired_bootstrap
from dgpo.rl.scoring import episode_scores
from dgpo.trajectory import Trajectory

# Properties of a question by which results are also shown apart, where the data has them.
SLICE_FIELDS = ("kind", "country_split", "held_out_paraphrase")
MEANS = ("f1", "sub_em", "num_searches", "answered", "hit")
NUM_RESAMPLES = 10_000

Score = dict[str, Any]


def score_episode(trajectory: Trajectory, row: Mapping[str, Any], *, set_name: str) -> Score:
    """One episode of one question as a flat record: `em`, `f1`, `sub_em` (0 without an answer), searches, hit, status.

    An episode whose search failed counts as wrong here: every question of a set is in the denominator.
    """
    golds = row_golds(row)
    info = row["extra_info"]
    return {
        "episode_id": trajectory.episode_id,
        "set": set_name,
        "question": row_question(row),
        "golds": golds,
        "answer": trajectory.answer,
        "status": trajectory.status,
        **episode_scores(trajectory, golds),
        "sub_em": float(trajectory.answer is not None and sub_exact_match(trajectory.answer, golds)),
        **{field: info[field] for field in SLICE_FIELDS if info.get(field) is not None},
    }


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over episodes of one set (or slice), EM with its 95% bootstrap interval, and counts by status."""
    em = [score["em"] for score in scores]
    return {
        "num_questions": len(scores),
        "em": float(np.mean(em)),
        "em_ci95": list(bootstrap_ci(em)),
        **{name: float(np.mean([score[name] for score in scores])) for name in MEANS},
        "status": dict(sorted(Counter(score["status"] for score in scores).items())),
    }


def summarize_model(scores: Sequence[Score]) -> dict[str, Any]:
    """All sets of one model: each set, their unweighted mean with its interval, and the slices over all sets."""
    sets = group_by(scores, "set")
    average = {
        name: float(np.mean([np.mean([score[name] for score in group]) for group in sets.values()]))
        for name in ("em", *MEANS)
    }
    interval = mean_of_sets([[score["em"] for score in group] for group in sets.values()])[1:]
    slices = {
        field: {value: summarize(group) for value, group in group_by(scores, field).items()}
        for field in SLICE_FIELDS
        if any(field in score for score in scores)
    }
    return {
        "num_questions": len(scores),
        "average": {**average, "em_ci95": list(interval)},
        "sets": {name: summarize(group) for name, group in sets.items()},
        "slices": {field: groups for field, groups in slices.items() if len(groups) > 1},
    }


def compare(scores: Sequence[Score], baseline: Sequence[Score]) -> dict[str, Any]:
    """EM difference to the baseline on the same questions, paired, with its 95% interval: per set and averaged.

    Raises:
        ValueError: the two did not answer the same questions.
    """
    if [score["episode_id"] for score in scores] != [score["episode_id"] for score in baseline]:
        raise ValueError("a paired comparison needs the same questions for both models: test them in one command")
    mine, theirs = group_by(scores, "set"), group_by(baseline, "set")
    pairs = {name: ([s["em"] for s in mine[name]], [s["em"] for s in theirs[name]]) for name in mine}
    differences = [(np.asarray(a) - np.asarray(b)).tolist() for a, b in pairs.values()]
    return {
        "average": list(mean_of_sets(differences)),
        "sets": {name: list(paired_bootstrap(a, b)) for name, (a, b) in pairs.items()},
    }


def mean_of_sets(values: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float, float]:
    """Unweighted mean over sets of their means, and its 95% interval with questions resampled within each set."""
    mean = float(np.mean([np.mean(group) for group in values]))
    if len(values) == 1:
        return (mean, *bootstrap_ci(values[0], seed=seed))
    generator = np.random.default_rng(seed)
    resampled = np.zeros(NUM_RESAMPLES)
    for group in values:
        data = np.asarray(group)
        # One resample at a time: [resamples, questions] of a large set would take gigabytes.
        resampled += [data[generator.integers(len(data), size=len(data))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(resampled / len(values), [0.025, 0.975])
    return mean, float(low), float(high)


def group_by(scores: Sequence[Score], field: str) -> dict[str, list[Score]]:
    """Scores by the value of `field`, values in order of appearance; episodes without the field are left out."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        if field in score:
            groups.setdefault(str(score[field]), []).append(score)
    return groups
