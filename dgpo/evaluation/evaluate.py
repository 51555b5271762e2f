"""Evaluation: episodes of every checkpoint on every question of every test set; greedy, all of them, by default.

python -m dgpo test test.models.dgpo=runs/dgpo/train/model data.test_files.nq=data/nq_test.parquet run_dir=runs/dgpo
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.artifacts import atomic_write_text, prepare_run_folder, write_manifest
from dgpo.config.checks import check_test
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows, row_golds, row_question
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes
from dgpo.engines.play import load_tokenizer, play_model
from dgpo.evaluation import upstream
from dgpo.evaluation.loggers import log_metrics
from dgpo.evaluation.records import finished_records, write_records
from dgpo.evaluation.scores import Score, compare, release_metrics, score_episode, summarize_model
from dgpo.evaluation.summary import print_results, update_summary
from dgpo.trajectory import Trajectory

# Questions per set whose episodes are also kept as text, the same ones for every model, for the report.
NUM_TRANSCRIPTS = 200


def evaluate(config: Config) -> Path | None:
    """Runs the stage; writes `test/results.json`, and per model its trajectories, scores, metrics and transcripts.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before an engine starts.
        SearchOutageError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_test(config)
    everything = rows = read_test_sets(config)
    if config.test.compat == "upstream":
        rows = upstream.drop_incomplete_batch(everything, config.test.upstream_batch_size)
    num_dropped = sum(map(len, everything.values())) - sum(map(len, rows.values()))
    if config.dry_run:
        sizes = ", ".join(f"{name} ({len(group)} questions)" for name, group in rows.items())
        samples = f", {config.test.samples} times each" if config.test.samples > 1 else ""
        print("\n".join([f"dry run: {', '.join(config.test.models)} would be tested on {sizes}{samples}.", *notes]))
        return None
    started = time.perf_counter()
    folder = prepare_run_folder(Path(config.run_dir) / "test", resume=config.resume)
    scores = {name: _evaluate_model(config, name, rows, folder / name) for name in config.test.models}
    models = {
        name: {"checkpoint": config.test.models[name], **summarize_model(group)} for name, group in scores.items()
    }
    results = {
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
    log_metrics(config, {name: model["metrics"] for name, model in results["models"].items()}, folder)
    return folder


def read_test_sets(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The questions of the chosen sets, at most `test.max_questions` of each."""
    names = config.test.sets or list(config.data.test_files)
    return {name: read_rows(config.data.test_files[name])[: config.test.max_questions] for name in names}


def sampling_temperature(config: Config) -> float:
    """`test.temperature`, or what it stands for where it is not set: greedy, unless samples are to differ."""
    test = config.test
    if test.temperature is not None:
        return test.temperature
    return upstream.TEMPERATURE if test.compat == "upstream" or test.samples > 1 else 0.0


def _evaluate_model(config: Config, name: str, rows: Mapping[str, Sequence[Any]], folder: Path) -> list[Score]:
    """Scores of one model, in the order of the rows; from its folder where a resumed run has finished it."""
    inputs = result_inputs(config, name)
    finished = finished_records(folder, stage="test", inputs=inputs)
    if finished is not None:
        return finished
    checkpoint, trusted = config.test.models[name], config.student.trust_remote_code
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trusted)
    planned = {
        set_name: plan_episodes(group, tokenizer, config=config, samples=config.test.samples, prefix=f"{set_name}/")
        for set_name, group in rows.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    trajectories = play_model(
        config,
        [episode for group in planned.values() for episode in group],
        model=checkpoint,
        tokenizer=tokenizer,
        temperature=sampling_temperature(config),
        trust_remote_code=trusted,
        path=folder / "trajectories.jsonl",
        name=f"test {name}",
    )
    played = {trajectory.episode_id: trajectory for trajectory in trajectories}
    scores = [
        _score(played[episode.episode_id], episode, tokenizer, config=config, set_name=set_name)
        for set_name, group in planned.items()
        for episode in group
    ]
    write_records(folder / "scores.jsonl", scores)
    shown = [episode for group in planned.values() for episode in group[: NUM_TRANSCRIPTS * config.test.samples]]
    write_records(folder / "transcripts.jsonl", [_transcript(played[e.episode_id], e, tokenizer) for e in shown])
    write_manifest(
        folder,
        stage="test",
        inputs=inputs,
        config=to_yaml(config),
        counts={"episodes": len(scores), "correct": int(sum(score["em"] for score in scores))},
        seed=config.seed,
    )
    return scores


def result_inputs(config: Config, name: str) -> dict[str, Any]:
    """What a model's scores depend on."""
    return {
        "checkpoint": config.test.models[name],
        "test_files": dict(config.data.test_files),
        "sets": config.test.sets,
        "max_questions": config.test.max_questions,
        "temperature": sampling_temperature(config),
        "samples": config.test.samples,
        "compat": config.test.compat,
        "upstream_batch_size": config.test.upstream_batch_size,
        "seed": config.seed,
    }


def _score(trajectory: Trajectory, episode: PlannedEpisode, tokenizer: Any, *, config: Config, set_name: str) -> Score:
    text = tokenizer.decode(trajectory.prompt_ids + trajectory.response_ids, skip_special_tokens=False)
    compat = config.test.compat == "upstream"
    score = score_episode(trajectory, episode.row, set_name=set_name, text=text, upstream=compat)
    if config.test.samples == 1:
        return score
    return {**score, "question_id": episode.question_id, "sample": episode.sample}


def _compare_all(scores: Mapping[str, list[Score]], baseline: str | None) -> dict[str, Any]:
    if baseline is None:
        return {}
    return {name: compare(group, scores[baseline]) for name, group in scores.items() if name != baseline}


def _transcript(trajectory: Trajectory, episode: PlannedEpisode, tokenizer: Any) -> dict[str, Any]:
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
