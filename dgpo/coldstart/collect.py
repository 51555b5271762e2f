"""Phase 1a: the teacher plays episodes (TGOs) on the questions of `data.collect_file`; the correct ones are kept.

python -m dgpo collect pair=qwen3b_05b data.collect_file=data/train.parquet run_dir=runs/dgpo
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgpo.agent.trajectory import Trajectory, write_trajectories
from dgpo.checks import check_collect
from dgpo.checks.files import is_assumed
from dgpo.coldstart.filter import end_at_answer, keep_correct, tail_counts
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows, row_golds
from dgpo.engines.episode_runner import plan_episodes
from dgpo.engines.play import load_tokenizer, play_model
from dgpo.hardware.dry_run import print_dry_run
from dgpo.runs.artifacts import prepare_run_folder, write_manifest
from dgpo.runs.identity import file_identity, model_identity, retriever_identity
from dgpo.runs.owner import owned
from dgpo.runs.settings import episode_settings, fixed_settings, is_finished

# Not `</answer>`: the teacher's own end token may then follow its answer. What else does is dropped from the episodes
# that are kept; `trajectories.jsonl` holds it.
COLLECT_STOP_STRINGS = ("</search>",)
# Decide which episodes are played, and not what happens in one.
WHICH_EPISODES = ("collect.max_questions", "collect.samples_per_question")


def collect(config: Config) -> Path | None:
    """Runs the stage; writes `collect/{trajectories,episodes}.jsonl` and a manifest.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before the engine starts; or `resume=true` under other settings.
        RunFolderExistsError: another command works in the folder.
        SearchOutageError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_collect(config)
    file = config.data.collect_file or ""
    rows = [] if is_assumed(config, file) else read_rows(file)[: config.collect.max_questions]
    if config.dry_run:
        times = f", {config.collect.samples_per_question} times each" * (config.collect.samples_per_question > 1)
        plan = f"{config.teacher.path} would play {len(rows) or 'the usual'} questions{times}"
        print_dry_run(config, "collect", plan, notes, rows=len(rows))
        return None
    folder = Path(config.run_dir) / "collect"
    with owned(folder):
        _collect(config, rows, folder)
    return folder


def collect_settings(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a collection of the teacher's episodes depends on."""
    settings = episode_settings(
        config,
        weights=model_identity(config.teacher.path or ""),
        retriever=retriever_identity(config.retriever, rows),
        temperature=config.collect.temperature,
        stop=COLLECT_STOP_STRINGS,
    )
    questions = {"data.collect_file": file_identity(config.data.collect_file or "")}
    return {**settings, **questions, **fixed_settings(config, "collect")}


def _collect(config: Config, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    settings = collect_settings(config, rows)
    if config.resume and is_finished(folder, stage="collect", settings=settings):
        return
    prepare_run_folder(folder, resume=config.resume)
    teacher, trusted = config.teacher.path or "", config.teacher.trust_remote_code
    tokenizer = load_tokenizer(teacher, trust_remote_code=trusted)
    planned = plan_episodes(rows, tokenizer, config=config, samples=config.collect.samples_per_question)
    trajectories = play_model(
        config,
        planned,
        model=teacher,
        tokenizer=tokenizer,
        temperature=config.collect.temperature,
        trust_remote_code=trusted,
        path=folder / "trajectories.jsonl",
        name="collect",
        settings={key: value for key, value in settings.items() if key not in WHICH_EPISODES},
        stop=COLLECT_STOP_STRINGS,
        log_probs=True,
    )
    golds = {episode.episode_id: row_golds(episode.row) for episode in planned}
    correct, counts = keep_correct(trajectories, golds)
    kept = [end_at_answer(trajectory, tokenizer) for trajectory in correct]
    write_trajectories(folder / "episodes.jsonl", kept)
    write_manifest(
        folder,
        stage="collect",
        inputs={"teacher": config.teacher.path, "questions": config.data.collect_file},
        config=to_yaml(config),
        counts={"episodes": len(trajectories), **counts, **tail_counts(kept)},
        seed=config.seed,
        settings=settings,
    )
    _print_table(trajectories, counts)
    print(
        "after </answer>: {dropped_tail_tokens} tokens of {episodes_with_tail} kept episodes dropped, "
        "{appended_end_tokens} end tokens appended".format(**tail_counts(kept))
    )


def _print_table(trajectories: list[Trajectory], counts: dict[str, int]) -> None:
    table = Table(title="Teacher episodes", title_justify="left")
    table.add_column("outcome")
    table.add_column("episodes", justify="right")
    table.add_column("share", justify="right")
    for reason, count in counts.items():
        table.add_row(reason, str(count), f"{count / max(len(trajectories), 1):.1%}")
    Console().print(table)
