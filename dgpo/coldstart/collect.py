"""Phase 1a: the teacher plays episodes (TGOs) on the questions of `data.collect_file`; the correct ones are kept.

`collect.from=oracle` plays a script instead, and `collect.from=transcripts` reads other people's episodes.

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
from dgpo.coldstart.errors import NothingKeptError
from dgpo.coldstart.filter import keep_correct
from dgpo.coldstart.oracle import OraclePolicy
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.config.stages import writer
from dgpo.data.rows import read_rows
from dgpo.engines.episode_runner import plan_episodes
from dgpo.engines.play import load_tokenizer, play_model, play_policy
from dgpo.hardware.dry_run import print_dry_run
from dgpo.runs.artifacts import MANIFEST, prepare_run_folder, write_manifest

# Not `</answer>`: the teacher's own end token then follows its answer, and the cold start trains the student to end.
COLLECT_STOP_STRINGS = ("</search>",)


def collect(config: Config) -> Path | None:
    """Runs the stage; writes `collect/{trajectories,episodes}.jsonl` and a manifest.

    Returns:
        The stage's folder, or None for a dry run.

    Raises:
        ConfigError: from the checks, before the engine starts.
        NothingKeptError: no episode was kept.
        SearchOutageError: the retriever failed too often; `resume=true` continues.
    """
    notes = check_collect(config)
    rows = read_rows(config.data.collect_file or "")[: config.collect.max_questions]
    if config.dry_run:
        times = f", {config.collect.samples_per_question} times each" * (config.collect.samples_per_question > 1)
        player = "the oracle" if config.collect.source == "oracle" else config.teacher.path
        plan = f"{player} would play {len(rows)} questions{times}"
        print_dry_run(config, "collect", plan, notes, rows=len(rows))
        return None
    folder = prepare_run_folder(Path(config.run_dir) / "collect", resume=config.resume)
    (folder / MANIFEST).unlink(missing_ok=True)
    trajectories = _play(config, rows, folder / "trajectories.jsonl")
    kept, counts = keep_correct(trajectories, {each.episode_id: each.golds for each in trajectories})
    if config.collect.source == "oracle":
        counts["missed"] = counts.pop("wrong")  # it gives up where no passage that was found holds a gold
    finish_collection(config, folder, kept, {"episodes": len(trajectories), **counts}, source=config.teacher.path)
    return folder


def finish_collection(
    config: Config, folder: Path, kept: Sequence[Trajectory], counts: Mapping[str, int], *, source: str | None
) -> None:
    """Writes the kept episodes and the manifest, and says what was kept.

    Raises:
        NothingKeptError: nothing was; the files are there all the same, to look into.
    """
    write_trajectories(folder / "episodes.jsonl", kept)
    write_manifest(
        folder,
        stage="collect",
        inputs={"source": config.collect.source, "teacher": source, "questions": config.data.collect_file},
        config=to_yaml(config),
        counts=counts,
        seed=config.seed,
    )
    _print_table(counts)
    if not kept:
        reasons = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "episodes")
        raise NothingKeptError(
            f"no episode was kept of {counts['episodes']} ({reasons}), so there is nothing to distil: look at what was "
            f"played in {folder}, and choose a stronger teacher, or collect.from=oracle"
        )
    print(f"{len(kept)} episodes in {folder / 'episodes.jsonl'}; next: python -m dgpo distill run_dir={config.run_dir}")


def _play(config: Config, rows: Sequence[Mapping[str, Any]], path: Path) -> list[Trajectory]:
    """Every planned episode, by the source that the configuration names."""
    model = writer(config)
    trusted = config.teacher.trust_remote_code
    tokenizer = load_tokenizer(model, trust_remote_code=trusted)
    planned = plan_episodes(rows, tokenizer, config=config, samples=config.collect.samples_per_question)
    if config.collect.source == "oracle":
        return play_policy(
            config,
            planned,
            policy=OraclePolicy(tokenizer, planned, seed=config.seed),
            tokenizer=tokenizer,
            path=path,
            settings={"model": model, "source": "oracle"},
            stop=COLLECT_STOP_STRINGS,
            name="collect",
            concurrency=config.retriever.max_concurrency,
        )
    return play_model(
        config,
        planned,
        model=model,
        tokenizer=tokenizer,
        temperature=config.collect.temperature,
        trust_remote_code=trusted,
        path=path,
        name="collect",
        stop=COLLECT_STOP_STRINGS,
        log_probs=True,
    )


def _print_table(counts: Mapping[str, int]) -> None:
    table = Table(title="Demonstrations", title_justify="left")
    table.add_column("outcome")
    table.add_column("episodes", justify="right")
    table.add_column("share", justify="right")
    for reason, count in counts.items():
        if reason != "episodes":
            table.add_row(reason, str(count), f"{count / max(counts['episodes'], 1):.1%}")
    Console().print(table)
