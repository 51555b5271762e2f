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

from dgpo.agent.protocol import TEMPLATE_DATE
from dgpo.agent.search import read_token
from dgpo.agent.trajectory import Trajectory, write_trajectories
from dgpo.checks import check_collect
from dgpo.checks.collect import served_model
from dgpo.coldstart.errors import NothingKeptError
from dgpo.coldstart.filter import keep_correct
from dgpo.coldstart.oracle import OraclePolicy
from dgpo.coldstart.transcripts import read_transcripts
from dgpo.config.load import to_yaml
from dgpo.config.schema import Config
from dgpo.config.stages import writer
from dgpo.data.lines import BadLines
from dgpo.data.rows import read_rows
from dgpo.engines.episode_runner import PlannedEpisode, plan_episodes
from dgpo.engines.http_policy import HttpPolicy
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
    if config.collect.source == "transcripts":
        return _collect_transcripts(config, notes)
    rows = read_rows(config.data.collect_file or "")[: config.collect.max_questions]
    if config.dry_run:
        times = f", {config.collect.samples_per_question} times each" * (config.collect.samples_per_question > 1)
        players = {"oracle": "the oracle", "teacher": config.teacher.url or config.teacher.path}
        plan = f"{players[config.collect.source]} would play {len(rows)} questions{times}"
        print_dry_run(config, "collect", plan, notes, rows=len(rows))
        return None
    folder = prepare_run_folder(Path(config.run_dir) / "collect", resume=config.resume)
    (folder / MANIFEST).unlink(missing_ok=True)
    trajectories, more = _play(config, rows, folder / "trajectories.jsonl")
    kept, counts = keep_correct(trajectories, {each.episode_id: each.golds for each in trajectories})
    if config.collect.source == "oracle":
        counts["missed"] = counts.pop("wrong")  # it gives up where no passage that was found holds a gold
    _finish(config, folder, kept, counts, total=len(trajectories), more=more)
    return folder


def _collect_transcripts(config: Config, notes: Sequence[str]) -> Path | None:
    """Other people's episodes from `data.collect_file`."""
    path = Path(config.data.collect_file or "")
    if config.dry_run:
        print_dry_run(config, "collect", f"the transcripts of {path} would be read", notes)
        return None
    folder = prepare_run_folder(Path(config.run_dir) / "collect", resume=config.resume)
    tokenizer = load_tokenizer(writer(config)[1], trust_remote_code=config.student.trust_remote_code)
    bad = BadLines(config.prepare.max_bad_lines)
    kept, counts = read_transcripts(path, tokenizer, limits=config.episode, bad=bad)
    _finish(config, folder, kept, counts, total=sum(counts.values()), more={"unusable_lines": len(bad.reasons)})
    return folder


def _finish(
    config: Config,
    folder: Path,
    kept: Sequence[Trajectory],
    counts: Mapping[str, int],
    *,
    total: int,
    more: Mapping[str, int],
) -> None:
    """Writes the kept episodes and the manifest, and says what was kept, where it lies and what comes next.

    Raises:
        NothingKeptError: nothing was; the files are there all the same, to look into.
    """
    write_trajectories(folder / "episodes.jsonl", kept)
    write_manifest(
        folder,
        stage="collect",
        inputs={
            "source": config.collect.source,
            "teacher": config.teacher.url or config.teacher.path if config.collect.source == "teacher" else None,
            "questions": config.data.collect_file,
        },
        config=to_yaml(config),
        counts={"episodes": total, **counts, **more},
        seed=config.seed,
    )
    _print_table(counts, total)
    for name, count in more.items():
        print(f"{name}: {count:,}")
    if not kept:
        reasons = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise NothingKeptError(
            f"no episode was kept of {total} ({reasons}), so that there is nothing to distil: look at what was played "
            f"in {folder}, and take a stronger teacher, or collect.from=oracle"
        )
    print(f"{len(kept)} episodes in {folder / 'episodes.jsonl'}; next: python -m dgpo distill run_dir={config.run_dir}")


def _play(config: Config, rows: Sequence[Mapping[str, Any]], path: Path) -> tuple[list[Trajectory], Mapping[str, int]]:
    """Every planned episode by the source that the configuration names, and what else was counted."""
    _, model = writer(config)
    teacher = config.teacher
    tokenizer = load_tokenizer(model, trust_remote_code=teacher.trust_remote_code)
    planned = plan_episodes(rows, tokenizer, config=config, samples=config.collect.samples_per_question)
    if config.collect.source == "teacher" and not teacher.url:
        return _play_teacher(config, planned, tokenizer, path), {}
    policy: OraclePolicy | HttpPolicy = (
        OraclePolicy(tokenizer, planned, seed=config.seed)
        if config.collect.source == "oracle"
        else _served_teacher(config, planned, tokenizer)
    )
    trajectories = play_policy(
        config,
        planned,
        policy=policy,
        tokenizer=tokenizer,
        path=path,
        settings={"model": model, "source": config.collect.source, "url": teacher.url},
        stop=COLLECT_STOP_STRINGS,
        name="collect",
        concurrency=teacher.url_concurrency if teacher.url else config.retriever.max_concurrency,
    )
    counts = policy.counts if isinstance(policy, HttpPolicy) else {}
    return trajectories, {f"teacher_{name}": count for name, count in counts.items()}


def _play_teacher(config: Config, planned: Sequence[PlannedEpisode], tokenizer: Any, path: Path) -> list[Trajectory]:
    return play_model(
        config,
        planned,
        model=config.teacher.path or "",
        tokenizer=tokenizer,
        temperature=config.collect.temperature,
        trust_remote_code=config.teacher.trust_remote_code,
        path=path,
        name="collect",
        stop=COLLECT_STOP_STRINGS,
        log_probs=True,
    )


def _served_teacher(config: Config, planned: Sequence[PlannedEpisode], tokenizer: Any) -> HttpPolicy:
    """The teacher behind `teacher.url`, with prompts in its own chat template where `teacher.path` has one."""
    teacher = config.teacher
    theirs = load_tokenizer(teacher.path, trust_remote_code=teacher.trust_remote_code) if teacher.path else tokenizer
    key = read_token(teacher.url_key_file)
    return HttpPolicy(
        teacher.url or "",
        model=served_model(config),
        tokenizer=tokenizer,
        prompts=None if teacher.url_ids else {each.episode_id: prompt_text(theirs, each.row) for each in planned},
        num_prompt_tokens={each.episode_id: len(each.prompt_ids) for each in planned},
        temperature=config.collect.temperature,
        ids=teacher.url_ids,
        key=key,
        max_retries=teacher.url_max_retries,
        timeout_s=teacher.url_timeout_s,
    )


def prompt_text(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """The prompt as text, without the token that a server puts before every text by itself."""
    text = tokenizer.apply_chat_template(
        list(row["prompt"]), add_generation_prompt=True, tokenize=False, date_string=TEMPLATE_DATE
    )
    begun = tokenizer.encode("", add_special_tokens=True)[:1]
    return text.removeprefix(tokenizer.decode(begun, skip_special_tokens=False)) if begun else text


def _print_table(counts: Mapping[str, int], total: int) -> None:
    table = Table(title="Demonstrations", title_justify="left")
    table.add_column("outcome")
    table.add_column("episodes", justify="right")
    table.add_column("share", justify="right")
    for reason, count in counts.items():
        table.add_row(reason, str(count), f"{count / max(total, 1):.1%}")
    Console().print(table)
