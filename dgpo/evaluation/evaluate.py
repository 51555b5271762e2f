"""Evaluation: greedy episodes of every checkpoint on every question of every test set.

python -m dgpo test test.models.dgpo=runs/dgpo/train/model data.test_files.nq=data/nq_test.parquet run_dir=runs/dgpo
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.artifacts import MANIFEST, atomic_write_text, prepare_run_folder, read_manifest, write_manifest
from dgpo.config.checks import check_test
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows, row_golds, row_question
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes, play_episodes
from dgpo.engines.vllm_policy import VllmPolicy
from dgpo.evaluation.scores import Score, compare, score_episode, summarize_model
from dgpo.evaluation.summary import print_results, update_summary
from dgpo.trajectory import Trajectory

# Questions per set whose episodes are also kept as text, the same ones for every model, for the report.
NUM_TRANSCRIPTS = 200


def evaluate(config: Config) -> Path | None:
    """Runs the stage; writes `test/results.json`, and per model its trajectories, scores and transcripts.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before an engine starts.
        SearchOutageError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_test(config)
    rows = {name: read_rows(file)[: config.test.max_questions] for name, file in config.data.test_files.items()}
    if config.dry_run:
        sizes = ", ".join(f"{name} ({len(group)} questions)" for name, group in rows.items())
        print("\n".join([f"dry run: {', '.join(config.test.models)} would be tested on {sizes}.", *notes]))
        return None
    started = time.perf_counter()
    folder = prepare_run_folder(Path(config.run_dir) / "test", resume=config.resume)
    scores = {name: _evaluate_model(config, name, rows, folder / name) for name in config.test.models}
    results = {
        "models": {
            name: {"checkpoint": config.test.models[name], **summarize_model(group)} for name, group in scores.items()
        },
        "baseline": config.test.baseline,
        "difference_to_baseline": _compare_all(scores, config.test.baseline),
        "temperature": config.test.temperature,
        "max_questions": config.test.max_questions,
        "seed": config.seed,
    }
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    update_summary(Path(config.run_dir), wall_s={"test": round(time.perf_counter() - started, 1)}, seed=config.seed)
    print_results(results)
    return folder


def _evaluate_model(config: Config, name: str, rows: Mapping[str, Sequence[Any]], folder: Path) -> list[Score]:
    """Scores of one model, in the order of the rows; from its folder where a resumed run has finished it."""
    if (folder / MANIFEST).exists():
        inputs = read_manifest(folder, stage="test")["inputs"]
        if inputs == _inputs(config, name):
            return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        (folder / MANIFEST).unlink()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _load_tokenizer(config, config.test.models[name])
    planned = {
        set_name: plan_episodes(group, tokenizer, config=config, prefix=f"{set_name}/")
        for set_name, group in rows.items()
    }
    everything = [episode for group in planned.values() for episode in group]
    trajectories = asyncio.run(_play(config, name, everything, tokenizer, folder / "trajectories.jsonl"))
    played = {trajectory.episode_id: trajectory for trajectory in trajectories}
    scores = [
        score_episode(played[episode.episode_id], episode.row, set_name=set_name)
        for set_name, group in planned.items()
        for episode in group
    ]
    _write_lines(folder / "scores.jsonl", scores)
    shown = [episode for group in planned.values() for episode in group[:NUM_TRANSCRIPTS]]
    _write_lines(folder / "transcripts.jsonl", [_transcript(played[e.episode_id], e, tokenizer) for e in shown])
    write_manifest(
        folder,
        stage="test",
        inputs=_inputs(config, name),
        config=to_yaml(config),
        counts={"episodes": len(scores), "correct": int(sum(score["em"] for score in scores))},
        seed=config.seed,
    )
    return scores


def _inputs(config: Config, name: str) -> dict[str, Any]:
    """What a model's scores depend on."""
    return {
        "checkpoint": config.test.models[name],
        "test_files": dict(config.data.test_files),
        "max_questions": config.test.max_questions,
        "temperature": config.test.temperature,
        "seed": config.seed,
    }


def _load_tokenizer(config: Config, path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=config.student.trust_remote_code)


async def _play(
    config: Config, name: str, planned: list[PlannedEpisode], tokenizer: Any, path: Path
) -> list[Trajectory]:
    checkpoint = config.test.models[name]
    policy = VllmPolicy(
        checkpoint,
        hardware=config.hardware,
        max_model_len=config.episode.max_prompt_tokens + config.episode.max_response_tokens,
        temperature=config.test.temperature,
        seed=config.seed,
        trust_remote_code=config.student.trust_remote_code,
    )
    async with policy:
        return await play_episodes(
            planned,
            policy=policy,
            tokenizer=tokenizer,
            config=config,
            path=path,
            settings={"model": checkpoint, "temperature": config.test.temperature},
            name=f"test {name}",
        )


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


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
