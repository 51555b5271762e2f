"""ARCap: what an agent can do, not only whether it is right; each dimension on every test set that allows it.

python -m dgpo arcap test.models.dgpo=runs/dgpo/train/model data.test_files.nq=data/prepared/nq_test.parquet

Each question is played up to three times, by the loop that also trains; without gold passages only once:
    at_once   its gold passages as <information>, then a forced <answer>     source referencing
    evidence  the same passages, then freely: think, search, answer          using evidence
    episode   an ordinary episode                                            query rewriting, when to search
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dgpo.agent.episode import Tokenizer, cut_passage
from dgpo.agent.protocol import render_observation, render_passages
from dgpo.agent.trajectory import Trajectory
from dgpo.checks import check_test
from dgpo.config.schema import Config
from dgpo.data.rows import row_gold_passages, row_golds, row_question
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes
from dgpo.errors import DataError
from dgpo.evaluation import upstream
from dgpo.evaluation.arcap_chart import DIMENSIONS
from dgpo.evaluation.paper import paper_arcap, protocol_note
from dgpo.evaluation.report import find_pair
from dgpo.evaluation.scores import Score, average_samples, group_by
from dgpo.evaluation.stage import Measured, load_tokenizers, measure_model, read_test_sets, sampling_temperature
from dgpo.files import atomic_write_text
from dgpo.hardware.dry_run import print_dry_run
from dgpo.metrics.exact_match import exact_match
from dgpo.metrics.hits import answer_in_passages
from dgpo.metrics.intervals import bootstrap_ci
from dgpo.runs.artifacts import prepare_run_folder
from dgpo.runs.owner import owned
from dgpo.runs.summary import table_console

FORCED_ANSWER = "<answer>"
# Dimension -> (how its episodes are played, field of an episode's score that it averages).
MEASURED = {
    "source_referencing": ("at_once", "em"),
    "using_evidence": ("evidence", "em"),
    "query_rewriting": ("episode", "first_hit"),
    "when_to_search": ("episode", "hit"),
}
# Tokens a passage may grow by where its ends join other text.
JOINT_TOKENS = 4


def arcap(config: Config) -> Path | None:
    """Runs the stage; writes `arcap/arcap.json`, and per model its trajectories and scores.

    Models, sets, samples and temperature are those of `test`; `test.compat=upstream` counts hits as the release does.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks; or another command works in the folder.
        DgpoError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_test(config, "arcap")
    sets = read_test_sets(config)
    num_given = {name: sum(map(bool, map(row_gold_passages, rows))) for name, rows in sets.items()}
    notes += [
        f"{name} has no gold passages (extra_info.gold_passages; docs/data.md says where they come from): no source "
        "referencing and no using evidence there"
        for name, number in num_given.items()
        if not number
    ]
    if config.dry_run:
        sizes = ", ".join(f"{name} ({len(rows)}, {num_given[name]} with gold passages)" for name, rows in sets.items())
        plan = f"{', '.join(config.test.models)} would be measured on {sizes}"
        print_dry_run(config, "arcap", plan, notes)
        return None
    tokenizers = load_tokenizers(config)
    folder = Path(config.run_dir) / "arcap"
    with owned(folder):
        _arcap(config, sets, tokenizers, folder)
    print("\n".join(notes), end="\n" if notes else "")
    return folder


def _arcap(
    config: Config, sets: Mapping[str, Sequence[Mapping[str, Any]]], tokenizers: Mapping[str, Any], folder: Path
) -> None:
    prepare_run_folder(folder, resume=config.resume)
    measured = {name: _measure(config, name, sets, folder / name, each) for name, each in tokenizers.items()}
    result = {
        "models": {
            name: {"checkpoint": config.test.models[name], "weights": each.weights, **summarize(each.scores)}
            for name, each in measured.items()
        },
        "hits": upstream.LABEL if config.test.compat == "upstream" else "ours",
        "samples": config.test.samples,
        "temperature": sampling_temperature(config),
        "seed": config.seed,
    }
    atomic_write_text(folder / "arcap.json", json.dumps(result, indent=1) + "\n")
    print_arcap(result, pair=find_pair(Path(config.run_dir)))
    print(f"results in {folder / 'arcap.json'}; next: python -m dgpo report run_dir={config.run_dir}", flush=True)


def _measure(
    config: Config, name: str, sets: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, tokenizer: Any
) -> Measured:
    raw = config.test.compat == "upstream"

    def plan(tokenizer: Any) -> list[PlannedEpisode]:
        return [
            episode
            for set_name, rows in sets.items()
            for group in plan_arcap(rows, tokenizer, config=config, set_name=set_name).values()
            for episode in group
        ]

    def score(episode: PlannedEpisode, trajectory: Trajectory, _: Any) -> Score:
        return {**episode.labels, **score_arcap(trajectory, episode, raw_hits=raw)}

    return measure_model(config, name, folder, tokenizer=tokenizer, stage="arcap", plan=plan, score=score)


def plan_arcap(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, config: Config, set_name: str
) -> dict[str, list[PlannedEpisode]]:
    """The episodes of one set by how they are played; questions without gold passages only as ordinary episodes."""

    def plan(task: str, some: Sequence[Mapping[str, Any]]) -> list[PlannedEpisode]:
        labels = {"set": set_name, "task": task}
        return plan_episodes(some, tokenizer, config=config, samples=config.test.samples, labels=labels)

    with_gold = [row for row in rows if row_gold_passages(row)]
    room = config.episode.max_response_tokens - config.episode.max_turn_tokens
    at_once, evidence = (
        [replace(each, given=gold_observation(each.row, tokenizer, max_tokens=room)) for each in plan(task, with_gold)]
        for task in ("at_once", "evidence")
    )
    return {
        "at_once": [replace(each, forced=FORCED_ANSWER) for each in at_once],
        "evidence": evidence,
        "episode": plan("episode", rows),
    }


def gold_observation(row: Mapping[str, Any], tokenizer: Tokenizer, *, max_tokens: int) -> str:
    """The row's gold passages as a search would have brought them, each cut alike where they are longer than allowed.

    Raises:
        DataError: there are too many of them for `max_tokens`.
    """
    documents = row_gold_passages(row)

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    frame = num_tokens(render_observation(render_passages([{**document, "contents": ""} for document in documents])))
    for limit in (max_tokens, (max_tokens - frame) // len(documents) - JOINT_TOKENS):
        if limit > 0:
            cut = [cut_passage(document, tokenizer, limit) for document in documents]
            text = render_observation(render_passages(cut))
            if num_tokens(text) <= max_tokens:
                return text
    raise DataError(
        f"the {len(documents)} gold passages of {row_question(row)!r} do not fit into {max_tokens} tokens: raise "
        "episode.max_response_tokens"
    )


def score_arcap(trajectory: Trajectory, episode: PlannedEpisode, *, raw_hits: bool = False) -> Score:
    """What ARCap counts of one episode: `em`, `hit` (of all searches), `first_hit` (of the first), `num_searches`.

    An episode that never searches has no hit; one without an answer, or whose search failed, is wrong.
    """
    golds = row_golds(episode.row)
    hits = [answer_in_passages(golds, record.documents, raw=raw_hits) for record in trajectory.searches]
    answer = trajectory.answer
    return {
        "episode_id": trajectory.episode_id,
        "question_id": episode.question_id,
        "question": row_question(episode.row),
        "golds": golds,
        "first_query": trajectory.searches[0].query if trajectory.searches else None,
        "answer": answer,
        "status": trajectory.status,
        "em": float(answer is not None and exact_match(answer, golds)),
        "hit": float(any(hits)),
        "first_hit": float(bool(hits) and hits[0]),
        "num_searches": float(trajectory.num_searches),
    }


def summarize(scores: Sequence[Score]) -> dict[str, dict[str, dict[str, Any]]]:
    """Dimension -> set -> its metric with an interval over questions, in the form that `arcap_chart` draws."""
    summary: dict[str, dict[str, dict[str, Any]]] = {dimension: {} for dimension in MEASURED}
    for set_name, group in group_by(scores, "set").items():
        tasks = {task: average_samples(part) for task, part in group_by(group, "task").items()}
        for dimension, (task, field) in MEASURED.items():
            values = [score[field] for score in tasks.get(task, [])]
            if not values:
                continue
            metric = DIMENSIONS[dimension][0]
            measured = {metric: float(np.mean(values)), f"{metric}_ci95": list(bootstrap_ci(values))}
            if dimension == "when_to_search":
                measured["num_searches"] = float(np.mean([score["num_searches"] for score in tasks[task]]))
            summary[dimension][set_name] = {**measured, "num_questions": len(values)}
    return summary


def print_arcap(result: Mapping[str, Any], *, pair: str | None) -> None:
    """One row per dimension and set, one column per model; behind a stroke the paper's number where it prints one."""
    upstream = result["hits"] != "ours"
    note = f"\n{result['hits'].upper()}: raw, case-sensitive substring hits" if upstream else ""
    note += f"\n{protocol_note({result['temperature']}, upstream=upstream)}" if pair else ""
    table = Table(title=f"What the agent can do (ARCap){note}", title_justify="left", title_style="bold")
    for column in ("dimension", "set", "questions"):
        table.add_column(column)
    models = result["models"]
    for name in models:
        table.add_column(name, justify="right")
    for dimension, (metric, label) in DIMENSIONS.items():
        for set_name in dict.fromkeys(each for model in models.values() for each in model[dimension]):
            cells = [_cell(model[dimension].get(set_name), metric) for model in models.values()]
            paper = [paper_arcap(pair, name, dimension, set_name) if pair else None for name in models]
            shown = [
                cell if value is None else f"{cell} [dim]/ {value:.3f}[/]"
                for cell, value in zip(cells, paper, strict=True)
            ]
            number = next(
                str(m[dimension][set_name]["num_questions"]) for m in models.values() if set_name in m[dimension]
            )
            table.add_row(f"{label} ({'EM' if metric == 'em' else metric})", set_name, number, *shown)
            if dimension == "when_to_search":
                searches = [f"{model[dimension][set_name]['num_searches']:.2f}" for model in models.values()]
                table.add_row("searches per episode", set_name, number, *searches)
    table_console().print(table)


def _cell(measured: Mapping[str, Any] | None, metric: str) -> str:
    if measured is None:
        return ""
    low, high = measured[f"{metric}_ci95"]
    return f"{measured[metric]:.3f} \\[{low:.2f}, {high:.2f}]"
