"""Drills of the stages that play episodes: the teacher's collection, and tests. Both write episodes as they finish."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.drills.disk import filled, small_disk
from tests.drills.processes import Command, DrillFailedError, Retriever, descendants, is_called, wait_for
from tests.drills.processes import kill as kill_process
from tests.drills.report import Outcome
from tests.drills.world import World

START_BOUND_S = 180.0
END_BOUND_S = 240.0
OUTAGE_S = 5.0
NUM_QUESTIONS = 120


class Playing:
    """One command that plays a number of questions, and the file that its episodes end up in.

    Args:
        stage: collect or test.
        episodes: of the finished stage, below the run folder.
        num_episodes: that it must hold.
    """

    def __init__(
        self, stage: str, run_dir: Path, overrides: Sequence[str], *, episodes: str, num_episodes: int, logs: Path
    ) -> None:
        self.stage, self.run_dir, self.num_episodes, self.logs = stage, run_dir, num_episodes, logs
        self.episodes = run_dir / episodes
        self.partial = Path(f"{self.episodes}.partial")
        self.arguments = [stage, f"run_dir={run_dir}", *overrides]
        self.num_commands = 0

    def start(self) -> Command:
        """Starts or resumes the stage."""
        self.num_commands += 1
        log = self.logs / f"{self.run_dir.name}-{self.num_commands}.log"
        resume = ["resume=true"] if (self.run_dir / self.stage).exists() else []
        self.command = Command([*self.arguments, *resume], log=log)
        return self.command

    def wait_for_episodes(self, number: int) -> None:
        wait_for(
            lambda: self.command.ended() or self.num_finished() >= number,
            bound_s=START_BOUND_S,
            what=f"episode {number} of {self.run_dir}",
        )
        if self.command.ended():
            raise DrillFailedError(f"{self.stage} ended before episode {number}: {self.command.message()}")

    def num_finished(self) -> int:
        return self.partial.read_bytes().count(b"\n") if self.partial.exists() else 0

    def finish(self) -> str:
        """Waits for the end of the command. Returns what was lost: nothing."""
        self.command.wait(bound_s=END_BOUND_S)
        if self.command.process.returncode != 0:
            raise DrillFailedError(f"{self.stage} did not end well: {self.command.message()} ({self.command.log})")
        ids = [json.loads(line)["episode_id"] for line in self.episodes.read_text().splitlines()]
        if len(ids) != self.num_episodes or len(set(ids)) != self.num_episodes:
            raise DrillFailedError(
                f"{self.episodes}: {len(ids)} episodes, {len(set(ids))} of them different, expected {self.num_episodes}"
            )
        return f"nothing: {len(ids)} episodes, each once"


def kill(playing: Playing) -> Outcome:
    """kill -9 of the stage, which resumes with what is finished."""
    command = playing.start()
    playing.wait_for_episodes(playing.num_episodes // 4)
    command.end()
    kept = playing.num_finished()
    resumed = playing.start()
    seconds = wait_for(
        lambda: resumed.ended() or playing.num_finished() > kept, bound_s=START_BOUND_S, what="an episode"
    )
    lost = playing.finish()
    return Outcome(f"{playing.stage} killed", "resumed", seconds, f"{kept} episodes were kept", lost)


def kill_engine(playing: Playing) -> Outcome:
    """kill -9 of vLLM's engine process in mid-episode."""
    command = playing.start()
    playing.wait_for_episodes(playing.num_episodes // 4)
    engines = [pid for pid in descendants(command.process.pid) if is_called(pid, "VLLM::EngineCore")]
    if not engines:
        raise DrillFailedError(f"{playing.stage} has no process called VLLM::EngineCore")
    kill_process(engines[0])
    seconds = command.wait(bound_s=END_BOUND_S)
    message = command.message()
    if command.process.returncode != 1 or "the engine died" not in message:
        raise DrillFailedError(
            f"expected exit code 1 and the engine's death as the last line of {command.log}: {message}"
        )
    playing.start()
    return Outcome(f"{playing.stage}: vLLM engine", "stopped; resumed", seconds, message, playing.finish())


def fill_disk(playing: Playing, disk: Path) -> Outcome:
    """The records meet a full disk; then there is room again."""
    command = playing.start()
    playing.wait_for_episodes(playing.num_episodes // 4)
    with filled(disk):
        seconds = command.wait(bound_s=END_BOUND_S)
        message = command.message()
    if command.process.returncode != 1 or "No space left on device" not in message:
        raise DrillFailedError(f"expected exit code 1 and the full disk as the last line of {command.log}: {message}")
    playing.start()
    return Outcome(f"{playing.stage}: full disk", "stopped; resumed", seconds, message, playing.finish())


def lose_retrievers(playing: Playing, retrievers: Sequence[Retriever]) -> Outcome:
    """All retrieval servers are gone for a while; searches wait."""
    playing.start()
    playing.wait_for_episodes(playing.num_episodes // 4)
    for retriever in retrievers:
        retriever.kill()
    time.sleep(OUTAGE_S)
    for retriever in retrievers:
        retriever.start()
    before = playing.num_finished()
    seconds = wait_for(
        lambda: playing.command.ended() or playing.num_finished() > before, bound_s=60, what="an episode"
    )
    what = f"after {OUTAGE_S:g} s of outage and the servers' start"
    return Outcome(f"{playing.stage}: all retrievers", "searches waited", seconds, what, playing.finish())


def drill(world: World, out: Path) -> Iterator[Outcome]:
    """Collection and test on a full disk, without their retrievers, and killed."""
    out.mkdir(parents=True, exist_ok=True)
    test = [f"test.models.teacher={world.folder / 'models' / 'teacher'}", f"test.max_questions={NUM_QUESTIONS}"]
    stages = {
        "collect": ([f"collect.max_questions={NUM_QUESTIONS}"], "collect/trajectories.jsonl"),
        "test": (test, "test/teacher/trajectories.jsonl"),
    }
    slowly = ["hardware.engine.concurrency=4"]  # so that there is a middle to be hit in
    with small_disk(out / "disk") as disk:
        for stage, (overrides, episodes) in stages.items():

            def playing(name: str, folder: Path = out, stage=stage, overrides=overrides, episodes=episodes) -> Playing:
                return Playing(
                    stage,
                    folder / f"{stage}-{name}",
                    [*world.overrides, *overrides, *slowly],
                    episodes=episodes,
                    num_episodes=NUM_QUESTIONS,
                    logs=out,
                )

            yield kill(playing("killed"))
            yield kill_engine(playing("engine"))
            yield lose_retrievers(playing("outage"), world.retrievers)
            if disk is None:
                yield Outcome(f"{stage}: full disk", "NOT RUN: mounting a small disk needs root", 0.0, "", "-")
            else:
                yield fill_disk(playing("disk", disk), disk)
