"""Scores of finished episodes: one flat record per episode, and their means with intervals.

With several samples of a question, its scores are averaged first: intervals and tests are over questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgpo.agent.scoring import episode_scores
from dgpo.agent.trajectory import Trajectory
from dgpo.data.rows import row_golds, row_question
from dgpo.evaluation.upstream import count_searches, extract_answer
from dgpo.metrics.exact_match import exact_match, sub_exact_match
from dgpo.metrics.hits import answer_in_passages
from dgpo.metrics.intervals import bootstrap_ci, paired_bootstrap

# Properties of a question by which results are also shown apart, where the data has them.
SLICE_FIELDS = ("data_source", "hops", "kind", "relation", "country_split", "held_out_paraphrase")
MEANS = ("f1", "sub_em", "num_searches", "answered", "hit")
# The other protocol's, of the same episodes.
OTHER_MEANS = ("em_ours", "hit_ours", "num_searches_ours", "em_upstream", "hit_upstream")
NUM_RESAMPLES = 10_000

Score = dict[str, Any]


def score_episode(
    trajectory: Trajectory, row: Mapping[str, Any], *, set_name: str, text: str | None = None, upstream: bool = False
) -> Score:
    """One episode of one question as a flat record: `em`, `f1`, `sub_em` (0 without an answer), searches, hit, status.

    An episode whose search failed counts as wrong here: every question of a set is in the denominator.

    Args:
        text: the whole episode, prompt included; adds `em_upstream` and `hit_upstream`.
        upstream: `answer`, `em`, `hit` and `num_searches` are the release's (dgpo.evaluation.upstream), and ours stand
            beside them as `em_ours`, `hit_ours` and `num_searches_ours`. Needs `text`.
    """
    golds = row_golds(row)
    info = {**row["extra_info"], "data_source": row.get("data_source")}
    score = {
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
    if text is None:
        return score
    answer = extract_answer(text)
    documents = [document for record in trajectory.searches for document in record.documents]
    em = float(answer is not None and exact_match(answer, golds))
    hit = float(answer_in_passages(golds, documents, raw=True))
    if not upstream:
        return {**score, "em_upstream": em, "hit_upstream": hit}
    theirs = {"answer": answer, "em": em, "hit": hit, "num_searches": float(count_searches(text))}
    return {**score, **theirs, **{f"{name}_ours": score[name] for name in ("em", "hit", "num_searches")}}


def average_samples(scores: Sequence[Score]) -> list[Score]:
    """One record per question: the first sample's, with the mean of every measured number; itself for one sample."""
    if not any("question_id" in score for score in scores):
        return list(scores)
    samples: dict[str, list[Score]] = {}
    for score in scores:
        samples.setdefault(score["question_id"], []).append(score)
    averaged = []
    for question_id, group in samples.items():
        measured = [name for name, value in group[0].items() if isinstance(value, float)]
        means = {name: float(np.mean([score[name] for score in group])) for name in measured}
        averaged.append({**group[0], **means, "episode_id": question_id})
    return averaged


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over questions of one set (or slice), EM with its 95% bootstrap interval, and episodes by status.

    With several samples of a question also `em_sd`, the deviation of the set's EM from sample to sample.
    """
    questions = average_samples(scores)
    em = [score["em"] for score in questions]
    by_sample = [[score["em"] for score in group] for group in group_by(scores, "sample").values()]
    return {
        "num_questions": len(questions),
        "num_episodes": len(scores),
        "em": float(np.mean(em)),
        "em_ci95": list(bootstrap_ci(em)),
        **({"em_sd": _deviation([float(np.mean(values)) for values in by_sample])} if by_sample else {}),
        **_means(questions),
        "searched": float(np.mean([score["num_searches"] > 0 for score in scores])),
        "status": dict(sorted(Counter(score["status"] for score in scores).items())),
    }


def summarize_model(scores: Sequence[Score]) -> dict[str, Any]:
    """All sets of one model: each set, their unweighted mean with its interval, and the slices over all sets."""
    sets = {name: summarize(group) for name, group in group_by(scores, "set").items()}
    questions = average_samples(scores)
    names = [name for name in ("em", *MEANS, *OTHER_MEANS) if name in questions[0]]
    average = {name: float(np.mean([group[name] for group in sets.values()])) for name in names}
    interval = mean_of_sets([[s["em"] for s in group] for group in group_by(questions, "set").values()])[1:]
    by_sample = [
        float(np.mean([np.mean([s["em"] for s in part]) for part in group_by(group, "set").values()]))
        for group in group_by(scores, "sample").values()
    ]
    slices = {
        field: {value: summarize(group) for value, group in sorted(group_by(scores, field).items())}
        for field in SLICE_FIELDS
        if any(field in score for score in scores)
    }
    return {
        "num_questions": len(questions),
        "num_episodes": len(scores),
        "average": {**average, "em_ci95": list(interval), **({"em_sd": _deviation(by_sample)} if by_sample else {})},
        "sets": sets,
        "slices": {field: groups for field, groups in slices.items() if len(groups) > 1},
    }


def release_metrics(model: Mapping[str, Any]) -> dict[str, float]:
    """The release's metric names for one summarised model, by set. Shares are of all episodes."""
    names = {
        "test_score": "em",
        "search_count": "num_searches",
        "search_present_ratio": "searched",
        "info_contains_answer_ratio": "hit",
    }
    sets = model["sets"].items()
    return {f"val/{theirs}/{name}": values[ours] for theirs, ours in names.items() for name, values in sets}


def _means(questions: Sequence[Score]) -> dict[str, float]:
    names = [name for name in (*MEANS, *OTHER_MEANS) if name in questions[0]]
    return {name: float(np.mean([score[name] for score in questions])) for name in names}


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample of at least two; 0 for one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def compare(scores: Sequence[Score], baseline: Sequence[Score]) -> dict[str, Any]:
    """EM difference to the baseline on the same questions, paired, with its 95% interval: per set and averaged.

    Raises:
        ValueError: the two did not answer the same questions.
    """
    scores, baseline = average_samples(scores), average_samples(baseline)
    if [score["episode_id"] for score in scores] != [score["episode_id"] for score in baseline]:
        raise ValueError("a paired comparison needs the same questions for both models: test them in one command")
    mine, theirs = group_by(scores, "set"), group_by(baseline, "set")
    pairs = {name: ([s["em"] for s in mine[name]], [s["em"] for s in theirs[name]]) for name in mine}
    differences = [(np.asarray(a) - np.asarray(b)).tolist() for a, b in pairs.values()]
    return {
        "average": list(mean_of_sets(differences)),
        "sets": {name: list(paired_bootstrap(a, b)) for name, (a, b) in pairs.items()},
    }


def mean_of_sets(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Unweighted mean over sets of their means, and its 95% interval with questions resampled within each set."""
    mean = float(np.mean([np.mean(group) for group in values]))
    if len(values) == 1:
        return (mean, *bootstrap_ci(values[0]))
    generator = np.random.default_rng(0)
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
