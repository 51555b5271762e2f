"""Plays many questions through the one episode loop: bounded concurrency, progress, and a file to resume from."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo.agent.episode import EpisodeLimits, Policy, Search, run_episode
from dgpo.agent.modes import MODES, mode_messages
from dgpo.agent.plugins import open_search
from dgpo.agent.protocol import STOP_STRINGS, encode_prompt
from dgpo.agent.seeds import derive_seed
from dgpo.agent.trajectory import Trajectory, read_trajectories, write_trajectories
from dgpo.config.schema import Config, RetrieverConfig
from dgpo.data.rows import row_golds, row_id, row_question
from dgpo.engines.bounded_policy import BoundedPolicy
from dgpo.errors import DataError, DgpoError
from dgpo.runs.settings import SETTINGS, check_same, differences, read_settings, write_settings

# Failures are judged against at least this many episodes, so that one early failure among many does not stop a run.
MIN_EPISODES_FOR_SHARE = 50
REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode to play.

    Attributes:
        episode_id: unique in its file; decides the seed.
        row: of the question.
        prompt_ids: [P].
        question_id: the same for all samples of a question.
        sample: its number among them.
        given, forced, opening_query: how the response begins before the policy writes, and `max_turns`, how many turns
            may search (`dgpo.agent.episode.run_episode`).
        labels: what its score carries, such as the set.
    """

    episode_id: str
    row: Mapping[str, Any]
    prompt_ids: list[int]
    question_id: str = ""
    sample: int = 0
    given: str = ""
    forced: str = ""
    opening_query: str = ""
    max_turns: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def corpus(self) -> str | None:
        return self.row["extra_info"].get("corpus")

    def label(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with question and golds of the row, where it has them."""
        if "reward_model" in self.row:
            trajectory.question, trajectory.golds = row_question(self.row), row_golds(self.row)
        return trajectory


def plan_episodes(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: Config,
    samples: int = 1,
    labels: Mapping[str, str] | None = None,
    mode: str = "agent",
) -> list[PlannedEpisode]:
    """Episodes for `rows`, `samples` of each, in row order; their ids begin with the labels.

    Args:
        mode: a key of `dgpo.agent.modes.MODES`.

    Raises:
        DataError: two rows share an id, or a prompt is longer than `episode.max_prompt_tokens`.
    """
    planned, seen, how = [], set(), MODES[mode]
    limit, labels = config.episode.max_prompt_tokens, labels or {}
    prefix = "".join(f"{label}/" for label in labels.values())
    for row in rows:
        name = prefix + row_id(row)
        if name in seen:
            raise DataError(f"two rows have the id {name!r}: give each an extra_info.id of its own")
        seen.add(name)
        prompt_ids = encode_prompt(tokenizer, mode_messages(how, row_question(row), row["prompt"]))
        if len(prompt_ids) > limit:
            raise DataError(
                f"question {name!r} has a prompt of {len(prompt_ids)} tokens, more than "
                f"episode.max_prompt_tokens={limit}: raise the limit or drop the question"
            )
        ids = [name] if samples == 1 else [f"{name}#{sample}" for sample in range(samples)]
        query = row_question(row) if how.searches_first else ""
        planned += [
            PlannedEpisode(
                each, row, prompt_ids, name, sample, opening_query=query, max_turns=how.max_turns, labels=labels
            )
            for sample, each in enumerate(ids)
        ]
    return planned


async def play_episodes(
    planned: Sequence[PlannedEpisode],
    *,
    policy: Policy,
    tokenizer: Any,
    config: Config,
    path: Path,
    settings: Mapping[str, Any],
    stop: Sequence[str] = STOP_STRINGS,
    name: str = "episodes",
    concurrency: int | None = None,
) -> list[Trajectory]:
    """Plays every planned episode that `path`'s partial file does not hold yet, and writes `path` when all are done.

    Finished episodes go to `<path>.partial` at once; episodes whose search failed do not, so resuming plays them again.

    Args:
        path: the jsonl file that holds all trajectories in the end, in the order of `planned`.
        settings: what the trajectories depend on (`dgpo.runs.settings.episode_settings`); resuming under others is
            refused.
        stop: strings that end a turn.
        name: of the progress line.
        concurrency: episodes in flight; None: `hardware.engine.concurrency`, which is of one engine.

    Raises:
        DgpoError: the policy's engine died or hangs, or the share of episodes with a failed search exceeds
            `retriever.max_failed_share`.
        ConfigError: the partial file was made under other settings.
    """
    partial = _Partial(path, settings)
    finished = {t.episode_id: t for t in partial.read()}
    pending = iter([episode for episode in planned if episode.episode_id not in finished])
    progress = _Progress(name, total=len(planned), done=len(finished))
    limits = EpisodeLimits.of(config.episode)
    num_failed = 0
    retriever = config.retriever
    bounded = BoundedPolicy(policy, turn_timeout_s=config.hardware.engine.turn_timeout_s)

    async def play_pending(search: Search) -> None:
        nonlocal num_failed
        for episode in pending:  # one iterator shared by all workers
            trajectory = await run_episode(
                episode_id=episode.episode_id,
                prompt_ids=episode.prompt_ids,
                policy=bounded,
                search=search,
                tokenizer=tokenizer,
                limits=limits,
                stop=stop,
                corpus=episode.corpus,
                seed=derive_seed(config.seed, episode.episode_id),
                given=episode.given,
                forced=episode.forced,
                opening_query=episode.opening_query,
                max_turns=episode.max_turns,
            )
            episode.label(trajectory).origin = getattr(policy, "origin", "sampled")
            finished[episode.episode_id] = trajectory
            progress.advance()
            if trajectory.status != "search_failed":
                partial.append(trajectory)
                continue
            num_failed += 1
            _check_failed_share(num_failed, num_finished=len(finished), num_planned=len(planned), retriever=retriever)

    try:
        async with open_search(retriever) as search, asyncio.TaskGroup() as workers:
            for _ in range(concurrency or config.hardware.engine.concurrency):
                workers.create_task(play_pending(search))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # the first error cancelled the other workers
    finally:
        progress.close()
        partial.close()
    trajectories = [finished[episode.episode_id] for episode in planned]
    write_trajectories(path, trajectories)
    partial.remove()
    return trajectories


def _check_failed_share(num_failed: int, *, num_finished: int, num_planned: int, retriever: RetrieverConfig) -> None:
    allowed = retriever.max_failed_share * max(num_finished, min(num_planned, MIN_EPISODES_FOR_SHARE))
    if num_failed > allowed:
        raise DgpoError(
            f"{num_failed} of {num_finished} episodes lost a search at {retriever.backend or retriever.url} "
            f"(retriever.max_failed_share={retriever.max_failed_share}): start the retriever again and repeat "
            f"the command with resume=true; {num_finished - num_failed} finished episodes are kept"
        )


def forget_episodes(path: Path, *, unless: Mapping[str, Any] | None = None) -> None:
    """Removes the partial file of `path`, and says why; not where it was made under the settings `unless`."""
    partial, settings = _partial_files(path)
    if not partial.exists():
        return
    before = read_settings(settings) or {}
    difference = differences(before, unless) if unless is not None else "they are played in one go"
    if difference:
        print(f"{partial}: its episodes are played again ({difference})", file=sys.stderr, flush=True)
        partial.unlink()
        settings.unlink(missing_ok=True)


def _partial_files(path: Path) -> tuple[Path, Path]:
    """Where the finished episodes of an unfinished `path` are, and what they depend on."""
    return Path(f"{path}.partial"), Path(f"{path}.{SETTINGS}")


class _Partial:
    """The growing file beside the final one, with the settings under which it grew."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings_path = _partial_files(path)
        if self.path.exists():
            check_same(read_settings(self.settings_path) or {}, settings, made=self.path)
        else:
            write_settings(self.settings_path, settings)
        self._drop_torn_line()
        self._file = self.path.open("ab", buffering=0)  # nothing is left to be written when a disk is full

    def _drop_torn_line(self) -> None:
        """A run that was killed in the middle of a write leaves a line without its end."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                self.path.write_bytes(whole)

    def read(self) -> Iterator[Trajectory]:
        return read_trajectories(self.path)

    def append(self, trajectory: Trajectory) -> None:
        """Writes one line, whole or not at all; raises `OSError` with the file's name, on a full disk for example."""
        data = f"{trajectory.to_json()}\n".encode()
        size = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.settings_path.unlink(missing_ok=True)


class _Progress:
    """A bar on a terminal; a plain line every 10 s in a log file."""

    def __init__(self, name: str, *, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.first = done
        self.started = self.reported = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=name, unit="episode", smoothing=0.05)

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.reported > REPORT_EVERY_S:
            self._line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def _line(self) -> None:
        self.reported = time.monotonic()
        rate = (self.done - self.first) / max(self.reported - self.started, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        print(f"{self.name}: {self.done}/{self.total} episodes, {rate:.2g} a second{left}", file=sys.stderr, flush=True)
