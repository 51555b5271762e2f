"""What `test` and `arcap` share: questions, temperature, and the episodes of one model played, scored and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgpo.agent.trajectory import Trajectory
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows
from dgpo.engines.episode_runner import PlannedEpisode
from dgpo.engines.play import load_tokenizer, play_model
from dgpo.evaluation import upstream
from dgpo.evaluation.records import finished_records, write_records
from dgpo.evaluation.scores import Score
from dgpo.runs.artifacts import write_manifest

Played = list[tuple[PlannedEpisode, Trajectory]]


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


def load_tokenizers(config: Config) -> dict[str, Any]:
    """Of every model, before one of them plays: a folder that is no checkpoint costs nobody's evaluation."""
    trusted = config.student.trust_remote_code
    return {name: load_tokenizer(path, trust_remote_code=trusted) for name, path in config.test.models.items()}


def measure_model(
    config: Config,
    name: str,
    folder: Path,
    *,
    tokenizer: Any,
    stage: str,
    plan: Callable[[Any], list[PlannedEpisode]],
    score: Callable[[PlannedEpisode, Trajectory, Any], Score],
    write_more: Callable[[Path, Played, Any], None] | None = None,
) -> list[Score]:
    """Scores of one model, in the order of its plan; from its folder where a resumed run has finished it.

    Args:
        name: of the model in `test.models`.
        folder: of the model in the stage; gets `trajectories.jsonl`, `scores.jsonl` and a manifest.
        tokenizer: of the model.
        plan: tokenizer -> the episodes.
        score: episode, its trajectory and the tokenizer -> its record.
        write_more: called with the folder, all episodes with their trajectories, and the tokenizer.
    """
    inputs = _inputs(config, name)
    finished = finished_records(folder, stage=stage, inputs=inputs)
    if finished is not None:
        return finished
    planned = plan(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    trajectories = play_model(
        config,
        planned,
        model=config.test.models[name],
        tokenizer=tokenizer,
        temperature=sampling_temperature(config),
        trust_remote_code=config.student.trust_remote_code,
        path=folder / "trajectories.jsonl",
        name=f"{stage} {name}",
    )
    played = list(zip(planned, trajectories, strict=True))
    scores = [score(episode, trajectory, tokenizer) for episode, trajectory in played]
    write_records(folder / "scores.jsonl", scores)
    if write_more:
        write_more(folder, played, tokenizer)
    counts = {"episodes": len(scores), "correct": int(sum(each["em"] for each in scores))}
    write_manifest(folder, stage=stage, inputs=inputs, config=to_yaml(config), counts=counts, seed=config.seed)
    return scores


def _inputs(config: Config, name: str) -> dict[str, Any]:
    """What a model's scores depend on."""
    return {
        "checkpoint": config.test.models[name],
        "test_files": dict(config.data.test_files),
        "sets": config.test.sets,
        "max_questions": config.test.max_questions,
        "temperature": sampling_temperature(config),
        "samples": config.test.samples,
        "rag": config.test.rag,
        "compat": config.test.compat,
        "upstream_batch_size": config.test.upstream_batch_size,
        "seed": config.seed,
    }
