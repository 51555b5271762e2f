"""What `test` and `arcap` share: questions, temperature, and the episodes of one model played, scored and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgpo.agent.protocol import STOP_STRINGS
from dgpo.agent.trajectory import Trajectory
from dgpo.checks.files import is_assumed
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import by_source, read_rows
from dgpo.engines.episode_runner import PlannedEpisode, forget_episodes
from dgpo.engines.play import load_tokenizer, play_model
from dgpo.errors import DataError
from dgpo.evaluation import upstream
from dgpo.evaluation.records import finished_records
from dgpo.evaluation.scores import Score
from dgpo.files import write_jsonl
from dgpo.runs.artifacts import write_manifest
from dgpo.runs.identity import file_identity, model_identity, retriever_identity
from dgpo.runs.settings import episode_settings

Played = list[tuple[PlannedEpisode, Trajectory]]
# Keys that decide which episodes are played and how they are scored, but not what happens in one.
WHICH_EPISODES = ("test.max_questions", "test.samples", "test.compat", "test.upstream_batch_size")


class Measured(NamedTuple):
    """What was measured of one model."""

    weights: str  # identity of those that played
    scores: list[Score]


def read_test_sets(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The questions of the chosen sets, at most `test.max_questions` of each; a plan leaves out what is not there.

    A file of several data sources, such as the release's `test.parquet`, is a set for each of them, by their names.

    Raises:
        DataError: two files hold a set of one name.
    """
    files = {name: config.data.test_files[name] for name in config.test.sets or config.data.test_files}
    there = {name: file for name, file in files.items() if not is_assumed(config, file)}
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, file in there.items():
        for each, rows in by_source(name, read_rows(file)).items():
            if each in sets:
                raise DataError(f"data.test_files.{name}={file}: the set {each} is in another file too: leave one out")
            sets[each] = rows[: config.test.max_questions]
    return sets


def sampling_temperature(config: Config) -> float:
    """`test.temperature`, or what it stands for where it is not set: greedy, unless samples are to differ."""
    test = config.test
    if test.temperature is not None:
        return test.temperature
    return upstream.TEMPERATURE if test.compat == "upstream" or test.samples > 1 else 0.0


def load_tokenizers(config: Config) -> dict[str, Any]:
    """Every model's tokenizer, before one of them plays: a folder that is no checkpoint costs nobody's evaluation."""
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
) -> Measured:
    """Scores of one model, in the order of its plan; from its folder where a resumed run has finished it.

    What its folder holds of other weights, questions or settings is played again, and that is said.

    Args:
        name: of the model in `test.models`.
        folder: of the model in the stage; gets `trajectories.jsonl`, `scores.jsonl` and a manifest.
        tokenizer: of the model.
        plan: tokenizer -> the episodes.
        score: episode, its trajectory and the tokenizer -> its record.
        write_more: called with the folder, all episodes with their trajectories, and the tokenizer.
    """
    planned = plan(tokenizer)
    settings = measured_settings(config, name, [episode.row for episode in planned])
    finished = finished_records(folder, stage=stage, settings=settings)
    if finished is not None:
        return Measured(settings["weights"], finished)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trajectories.jsonl"
    played_under = {key: value for key, value in settings.items() if key not in WHICH_EPISODES}
    forget_episodes(path, unless=played_under)
    trajectories = play_model(
        config,
        planned,
        model=config.test.models[name],
        tokenizer=tokenizer,
        temperature=sampling_temperature(config),
        trust_remote_code=config.student.trust_remote_code,
        path=path,
        name=f"{stage} {name}",
        settings=played_under,
    )
    played = list(zip(planned, trajectories, strict=True))
    scores = [score(episode, trajectory, tokenizer) for episode, trajectory in played]
    write_jsonl(folder / "scores.jsonl", scores)
    if write_more:
        write_more(folder, played, tokenizer)
    counts = {"episodes": len(scores), "correct": int(sum(each["em"] for each in scores))}
    write_manifest(
        folder,
        stage=stage,
        inputs={"checkpoint": config.test.models[name], "test_files": dict(config.data.test_files)},
        config=to_yaml(config),
        counts=counts,
        seed=config.seed,
        settings=settings,
    )
    return Measured(settings["weights"], scores)


def measured_settings(config: Config, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model's scores on these questions depend on."""
    test = config.test
    settings = episode_settings(
        config,
        weights=model_identity(test.models[name]),
        retriever=retriever_identity(config.retriever, rows),
        temperature=sampling_temperature(config),
        stop=STOP_STRINGS,
    )
    files = {each: file_identity(config.data.test_files[each]) for each in test.sets or config.data.test_files}
    return {
        **settings,
        "mode": test.modes.get(name, "agent"),
        "data.test_files": files,
        "test.max_questions": test.max_questions,
        "test.samples": test.samples,
        "test.compat": test.compat,
        "test.upstream_batch_size": test.upstream_batch_size if test.compat == "upstream" else None,
    }
