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

from dgpo.agent.protocol import TEMPLATE_VARIABLES
from dgpo.agent.search import read_token
from dgpo.agent.trajectory import Trajectory, write_trajectories
from dgpo.checks import check_collect
from dgpo.checks.collect import served_model
from dgpo.checks.files import is_assumed
from dgpo.coldstart.filter import end_at_answer, keep_correct, tail_counts
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
from dgpo.errors import DgpoError
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
        ConfigError: from the checks, before the engine starts; `resume=true` under other settings; or another command
            works in the folder.
        DgpoError: no episode was kept; or the retriever failed too often, and `resume=true` continues.
    """
    notes = check_collect(config)
    file = config.data.collect_file or ""
    is_text = config.collect.source == "transcripts"
    rows = [] if is_text or is_assumed(config, file) else read_rows(file)[: config.collect.max_questions]
    if config.dry_run:
        print_dry_run(config, "collect", _plan(config, rows), notes, rows=len(rows))
        return None
    folder = Path(config.run_dir) / "collect"
    with owned(folder):
        _collect(config, rows, folder)
    return folder


def collect_settings(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a collection depends on: who plays, or wrote, on which questions, and under which rules."""
    teacher, is_text = config.teacher, config.collect.source == "transcripts"
    settings = episode_settings(
        config,
        weights=model_identity(writer(config)[1]),
        retriever=None if is_text else retriever_identity(config.retriever, rows),
        temperature=config.collect.temperature,
        stop=COLLECT_STOP_STRINGS,
    )
    served = {"teacher.url_model": teacher.url_model, "teacher.url_ids": teacher.url_ids} if teacher.url else {}
    questions = {"data.collect_file": file_identity(config.data.collect_file or "")}
    return {**settings, **served, **questions, **fixed_settings(config, "collect")}


def _plan(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    if config.collect.source == "transcripts":
        return f"the transcripts of {config.data.collect_file} would be read"
    samples = config.collect.samples_per_question
    times = f", {samples} times each" if samples > 1 else ""
    player = "the oracle" if config.collect.source == "oracle" else config.teacher.url or config.teacher.path
    return f"{player} would play {len(rows) or 'the usual'} questions{times}"


def _collect(config: Config, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    settings = collect_settings(config, rows)
    if config.resume and is_finished(folder, stage="collect", settings=settings):
        return
    prepare_run_folder(folder, resume=config.resume)
    tokenizer = load_tokenizer(writer(config)[1], trust_remote_code=config.teacher.trust_remote_code)
    if config.collect.source == "transcripts":
        bad = BadLines(config.prepare.max_bad_lines)
        path = Path(config.data.collect_file or "")
        kept, counts = read_transcripts(path, tokenizer, limits=config.episode, bad=bad)
        total, more = sum(counts.values()), {"unusable_lines": len(bad.reasons)}
    else:
        trajectories, more = _play(config, rows, tokenizer, settings, folder / "trajectories.jsonl")
        correct, counts = keep_correct(trajectories, {each.episode_id: each.golds for each in trajectories})
        kept, total = [end_at_answer(trajectory, tokenizer) for trajectory in correct], len(trajectories)
    if config.collect.source == "oracle":
        counts["missed"] = counts.pop("wrong")  # it gives up where no passage that was found holds a gold
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
        counts={"episodes": total, **counts, **more, **tail_counts(kept)},
        seed=config.seed,
        settings=settings,
    )
    _print_table(counts, total)
    for name, count in more.items():
        print(f"{name}: {count:,}")
    if not kept:
        reasons = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise DgpoError(
            f"no episode was kept of {total} ({reasons}), so that there is nothing to distil: look at what was played "
            f"in {folder}, and take a stronger teacher, or collect.from=oracle"
        )
    print(
        "after </answer>: {dropped_tail_tokens} tokens of {episodes_with_tail} kept episodes dropped, "
        "{appended_end_tokens} end tokens appended".format(**tail_counts(kept))
    )
    print(f"{len(kept)} episodes in {folder / 'episodes.jsonl'}; next: python -m dgpo distill run_dir={config.run_dir}")


def _play(
    config: Config, rows: Sequence[Mapping[str, Any]], tokenizer: Any, settings: Mapping[str, Any], path: Path
) -> tuple[list[Trajectory], dict[str, int]]:
    """Every planned episode by the source that the configuration names, and what else was counted."""
    teacher = config.teacher
    planned = plan_episodes(rows, tokenizer, config=config, samples=config.collect.samples_per_question)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "path": path,
        "name": "collect",
        "settings": {key: value for key, value in settings.items() if key not in WHICH_EPISODES},
        "stop": COLLECT_STOP_STRINGS,
    }
    if config.collect.source == "oracle":
        oracle = OraclePolicy(tokenizer, planned, seed=config.seed)
        return play_policy(config, planned, policy=oracle, concurrency=config.retriever.max_concurrency, **options), {}
    if teacher.url:
        served = _served_teacher(config, planned, tokenizer)
        trajectories = play_policy(config, planned, policy=served, concurrency=teacher.url_concurrency, **options)
        return trajectories, {f"teacher_{name}": count for name, count in served.counts.items()}
    return play_model(
        config,
        planned,
        model=teacher.path or "",
        temperature=config.collect.temperature,
        trust_remote_code=teacher.trust_remote_code,
        log_probs=True,
        **options,
    ), {}


def _served_teacher(config: Config, planned: Sequence[PlannedEpisode], tokenizer: Any) -> HttpPolicy:
    """The teacher behind `teacher.url`, with prompts in its own chat template where `teacher.path` has one."""
    teacher = config.teacher
    theirs = load_tokenizer(teacher.path, trust_remote_code=teacher.trust_remote_code) if teacher.path else tokenizer
    key = read_token(teacher.url_key_file, key="teacher.url_key_file")
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
        list(row["prompt"]), add_generation_prompt=True, tokenize=False, **TEMPLATE_VARIABLES
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
