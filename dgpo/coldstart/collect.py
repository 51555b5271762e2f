"""Phase 1a: the teacher plays episodes (TGOs) on the questions of `data.collect_file`; the correct ones are kept.

python -m dgpo collect pair=qwen3b_05b data.collect_file=data/train.parquet run_dir=runs/dgpo
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from dgpo.agent.trajectory import Trajectory, write_trajectories
from dgpo.checks import check_collect
from dgpo.coldstart.filter import end_at_answer, keep_correct, tail_counts
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.data.rows import read_rows, row_golds
from dgpo.engines.episode_runner import plan_episodes
from dgpo.engines.play import load_tokenizer, play_model
from dgpo.hardware.dry_run import print_dry_run
from dgpo.runs.artifacts import MANIFEST, prepare_run_folder, write_manifest

# Not `</answer>`: the teacher's own end token may then follow its answer. What else does is dropped from the episodes
# that are kept; `trajectories.jsonl` holds it.
COLLECT_STOP_STRINGS = ("</search>",)


def collect(config: Config) -> Path | None:
    """Runs the stage; writes `collect/{trajectories,episodes}.jsonl` and a manifest.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before the engine starts.
        SearchOutageError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_collect(config)
    rows = read_rows(config.data.collect_file or "")[: config.collect.max_questions]
    if config.dry_run:
        times = f", {config.collect.samples_per_question} times each" * (config.collect.samples_per_question > 1)
        plan = f"{config.teacher.path} would play {len(rows)} questions{times}"
        print_dry_run(config, "collect", plan, notes, rows=len(rows))
        return None
    folder = prepare_run_folder(Path(config.run_dir) / "collect", resume=config.resume)
    (folder / MANIFEST).unlink(missing_ok=True)
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
    )
    _print_table(trajectories, counts)
    print(
        "after </answer>: {dropped_tail_tokens} tokens of {episodes_with_tail} kept episodes dropped, "
        "{appended_end_tokens} end tokens appended".format(**tail_counts(kept))
    )
    return folder


def _print_table(trajectories: list[Trajectory], counts: dict[str, int]) -> None:
    table = Table(title="Teacher episodes", title_justify="left")
    table.add_column("outcome")
    table.add_column("episodes", justify="right")
    table.add_column("share", justify="right")
    for reason, count in counts.items():
        table.add_row(reason, str(count), f"{count / max(len(trajectories), 1):.1%}")
    Console().print(table)
