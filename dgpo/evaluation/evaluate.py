"""Evaluation: episodes of every checkpoint on every question of every test set; greedy, all of them, by default.

python -m dgpo test test.models.dgpo=runs/dgpo/train/model data.test_files.nq=data/nq_test.parquet run_dir=runs/dgpo
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dgpo.agent.trajectory import Trajectory
from dgpo.checks import check_test
from dgpo.config.schema import Config
from dgpo.data.rows import row_golds, row_question
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes
from dgpo.evaluation import upstream
from dgpo.evaluation.loggers import log_metrics
from dgpo.evaluation.scores import Score, compare, release_metrics, score_episode, summarize_model
from dgpo.evaluation.stage import Measured, Played, load_tokenizers, measure_model, read_test_sets, sampling_temperature
from dgpo.files import atomic_write_text, write_jsonl
from dgpo.hardware.dry_run import print_dry_run
from dgpo.runs.artifacts import prepare_run_folder
from dgpo.runs.owner import owned
from dgpo.runs.summary import print_results, update_summary

# Questions per set whose episodes are also kept as text, the same ones for every model, for the report.
NUM_TRANSCRIPTS = 200


def evaluate(config: Config) -> Path | None:
    """Runs the stage; writes `test/results.json`, and per model its trajectories, scores, metrics and transcripts.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before an engine starts; or another command works in the folder.
        DgpoError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_test(config)
    everything = rows = read_test_sets(config)
    if config.test.compat == "upstream":
        rows = upstream.drop_incomplete_batch(everything, config.test.upstream_batch_size)
    num_dropped = sum(map(len, everything.values())) - sum(map(len, rows.values()))
    if config.dry_run:
        sizes = ", ".join(f"{name} ({len(group)} questions)" for name, group in rows.items()) or "the paper's sets"
        samples = f", {config.test.samples} times each" if config.test.samples > 1 else ""
        plan = f"{', '.join(config.test.models)} would be tested on {sizes}{samples}"
        print_dry_run(config, "test", plan, notes, rows=sum(map(len, rows.values())) * len(config.test.models))
        return None
    tokenizers = load_tokenizers(config)
    folder = Path(config.run_dir) / "test"
    with owned(folder):
        _evaluate(config, rows, tokenizers, folder, num_dropped=num_dropped)
    return folder


def _evaluate(
    config: Config,
    rows: Mapping[str, Sequence[Any]],
    tokenizers: Mapping[str, Any],
    folder: Path,
    *,
    num_dropped: int,
) -> None:
    started = time.perf_counter()
    prepare_run_folder(folder, resume=config.resume)
    measured = {name: _evaluate_model(config, name, rows, folder / name, each) for name, each in tokenizers.items()}
    scores = {name: each.scores for name, each in measured.items()}
    models = {
        name: {
            "checkpoint": config.test.models[name],
            "weights": each.weights,
            "mode": config.test.modes.get(name, "agent"),
            **summarize_model(each.scores),
        }
        for name, each in measured.items()
    }
    results: dict[str, Any] = {
        "models": {name: {**model, "metrics": release_metrics(model)} for name, model in models.items()},
        "baseline": config.test.baseline,
        "difference_to_baseline": _compare_all(scores, config.test.baseline),
        "protocol": upstream.LABEL if config.test.compat == "upstream" else "ours",
        "num_dropped": num_dropped,
        "samples": config.test.samples,
        "temperature": sampling_temperature(config),
        "max_questions": config.test.max_questions,
        "seed": config.seed,
    }
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    update_summary(Path(config.run_dir), wall_s={"test": round(time.perf_counter() - started, 1)}, seed=config.seed)
    if "console" in config.test.loggers:
        print_results(results)
    print(f"results in {folder}; next: python -m dgpo report run_dir={config.run_dir}", flush=True)
    log_metrics(config, {name: model["metrics"] for name, model in results["models"].items()}, folder)


def _evaluate_model(
    config: Config, name: str, rows: Mapping[str, Sequence[Any]], folder: Path, tokenizer: Any
) -> Measured:
    def plan(tokenizer: Any) -> list[PlannedEpisode]:
        return [
            episode
            for set_name, group in rows.items()
            for episode in plan_episodes(
                group,
                tokenizer,
                config=config,
                samples=config.test.samples,
                labels={"set": set_name},
                mode=config.test.modes.get(name, "agent"),
            )
        ]

    return measure_model(
        config,
        name,
        folder,
        tokenizer=tokenizer,
        stage="test",
        plan=plan,
        score=partial(_score, config=config),
        write_more=_write_transcripts,
    )


def _score(episode: PlannedEpisode, trajectory: Trajectory, tokenizer: Any, *, config: Config) -> Score:
    text = tokenizer.decode(trajectory.prompt_ids + trajectory.response_ids, skip_special_tokens=False)
    compat = config.test.compat == "upstream"
    score = score_episode(trajectory, episode.row, set_name=episode.labels["set"], text=text, upstream=compat)
    if config.test.samples == 1:
        return score
    return {**score, "question_id": episode.question_id, "sample": episode.sample}


def _compare_all(scores: Mapping[str, list[Score]], baseline: str | None) -> dict[str, Any]:
    if baseline is None:
        return {}
    return {name: compare(group, scores[baseline]) for name, group in scores.items() if name != baseline}


def _write_transcripts(folder: Path, played: Played, tokenizer: Any) -> None:
    """The episodes of each set's first questions."""
    shown: dict[str, set[str]] = {}
    transcripts = []
    for episode, trajectory in played:
        questions = shown.setdefault(episode.labels["set"], set())
        if len(questions) < NUM_TRANSCRIPTS or episode.question_id in questions:
            questions.add(episode.question_id)
            transcripts.append(_transcript(episode, trajectory, tokenizer))
    write_jsonl(folder / "transcripts.jsonl", transcripts)


def _transcript(episode: PlannedEpisode, trajectory: Trajectory, tokenizer: Any) -> dict[str, Any]:
    """An episode as text: segments ["policy" | "environment", text] in order."""
    segments: list[tuple[str, list[int]]] = []
    for token, generated in zip(trajectory.response_ids, trajectory.response_mask, strict=True):
        speaker = "policy" if generated else "environment"
        if not segments or segments[-1][0] != speaker:
            segments.append((speaker, []))
        segments[-1][1].append(token)
    return {
        "episode_id": trajectory.episode_id,
        "question": row_question(episode.row),
        "golds": row_golds(episode.row),
        "segments": [[speaker, tokenizer.decode(ids, skip_special_tokens=False)] for speaker, ids in segments],
    }
