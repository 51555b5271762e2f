"""Drills of RL: one run is hit by fault after fault, goes on after each, and must end as if nothing had happened.

Every fault is met by a restart, by recovery, or by a clean stop and `resume=true`; the next one hits what came of it.
In the end the run's records, questions and weights are compared with those of a run that was left alone.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgpo.runs.faults import FAILURE
from dgpo.runs.processes import marked_processes
from tests.drills.disk import filled, small_disk
from tests.drills.processes import Command, DrillFailedError, Retriever, find, kill, wait_for
from tests.drills.report import Outcome
from tests.drills.world import World

START_BOUND_S = 600.0  # from the command to its first step, on a busy machine
STEP_BOUND_S = 90.0
EXIT_BOUND_S = 180.0  # of every process, once its run was stopped; Ray's agents wait for a control server that is gone
OUTAGE_S = 5.0
ROLLOUT_LIMIT_S = 45  # for a frozen engine; more than a rollout takes on a busy machine
TOLERANCE = 1e-6
OF_THE_MOMENT = ("timing_s", "timing_per_token_ms", "perf", "mfu")
RESTART = "; restart 1 of 1"
NUM_EPISODES = 8  # of a step
NUM_STEPS = 50  # more than the faults take
SETTINGS = [
    f"train.num_steps={NUM_STEPS}",
    "train.save_every=2",
    f"train.batch_size={NUM_EPISODES}",
    f"train.mini_batch_size={NUM_EPISODES}",
    f"hardware.micro_batch_size={NUM_EPISODES}",
    "train.teacher_term.gate=none",
    "train.log_episodes_every=1",
    f"train.num_logged_episodes={NUM_EPISODES}",
    "train.generation_concurrency=1",  # repeatable to the last bit, and long enough to be hit in mid-rollout
]


@dataclass(frozen=True)
class Fault:
    """A process of the run that is killed or frozen in the middle of a step.

    Attributes:
        title: the name that Ray or vLLM gives it.
        named: what the message must say.
        number: SIGSTOP freezes it.
        restarts: whether the run goes on by itself.
        bound_s: until the run has stopped or made its next step.
        overrides: of the command that is hit.
    """

    name: str
    title: str
    named: str
    number: signal.Signals = signal.SIGKILL
    restarts: bool = False
    bound_s: float = 60.0
    overrides: Sequence[str] = ()


NO_RESTART = ["train.max_restarts=0"]
ENGINE = Fault("vLLM engine", "VLLM::EngineCore", "vLLM server 0", overrides=NO_RESTART)
FAULTS = [
    ENGINE,
    Fault(
        "vLLM server",
        "ray::TetheredServer",
        "vLLM server 0",
        restarts=True,
        bound_s=240.0,
        overrides=["train.max_restarts=1"],
    ),
    Fault("agent-loop worker", "ray::AgentLoopWorker", "agent-loop worker 0", overrides=NO_RESTART),
    Fault("model worker", "ray::WorkerDict", "model worker 0", overrides=NO_RESTART),
    Fault("episode store", "ray::SimpleStorageUnit", "episode store unit 0", overrides=NO_RESTART),
    Fault("trainer", "ray::TaskRunner", "the trainer's process died", overrides=NO_RESTART),
    Fault(
        "frozen vLLM engine",
        "VLLM::EngineCore",
        f"rollout took longer than train.limits.rollout_s={ROLLOUT_LIMIT_S}",
        number=signal.SIGSTOP,
        bound_s=ROLLOUT_LIMIT_S + 60.0,
        overrides=[*NO_RESTART, f"train.limits.rollout_s={ROLLOUT_LIMIT_S}"],
    ),
]


class TrainingRun:
    """One run folder, and the command that works in it at the moment."""

    def __init__(self, run_dir: Path, overrides: Sequence[str], *, logs: Path) -> None:
        self.run_dir, self.folder, self.logs = run_dir, run_dir / "train", logs
        self.overrides = [f"run_dir={run_dir}", *overrides, *SETTINGS]
        self.command: Command | None = None
        self.num_commands = 0

    def start(self, *overrides: str) -> None:
        """Starts or resumes the run."""
        self.num_commands += 1
        log = self.logs / f"{self.run_dir.name}-{self.num_commands}.log"
        resume = ["resume=true"] if self.folder.exists() else []
        self.command = Command(["train", *self.overrides, *overrides, *resume], log=log)

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def last_step(self) -> int:
        records = self.records()
        return int(records[-1]["step"]) if records else 0

    def wait_for_step(self, step: int, *, bound_s: float) -> float:
        """Seconds until the record of a step was written."""
        command = self.command_now()

        def made() -> bool:
            if self.last_step() >= step:
                return True
            if command.ended():
                raise DrillFailedError(f"the run ended before step {step}: {command.message()}")
            return False

        return wait_for(made, bound_s=bound_s, what=f"step {step} of {self.run_dir}")

    def wait_until_it_works(self) -> None:
        """Until the command has made a step of its own."""
        self.wait_for_log("   EM ", bound_s=START_BOUND_S + STEP_BOUND_S)  # a step's line on its own terminal

    def wait_for_log(self, text: str, *, bound_s: float) -> None:
        command = self.command_now()

        def said() -> bool:
            if text in command.log.read_text(errors="replace"):
                return True
            if command.ended():
                raise DrillFailedError(f"the run ended early: {command.message()}")
            return False

        wait_for(said, bound_s=bound_s, what=f"{text!r} in {command.log}")

    def wait_for_end(self, *, code: int, bound_s: float) -> float:
        """Seconds until the command and all its processes have ended.

        Raises:
            DrillFailedError: in time they did not, or with another exit code.
        """
        command = self.command_now()
        seconds = command.wait(bound_s=bound_s)
        if command.process.returncode != code:
            raise DrillFailedError(
                f"exit code {command.process.returncode}, expected {code}: {command.message()} ({command.log})"
            )
        return seconds + self.wait_for_processes()

    def wait_for_processes(self) -> float:
        """Seconds until no process of the run is left."""
        return wait_for(
            lambda: not marked_processes(self.folder), bound_s=EXIT_BOUND_S, what="the end of the run's processes"
        )

    def kill_driver(self) -> None:
        self.command_now().process.kill()
        self.command_now().process.wait()

    def episodes(self, step: int) -> list[tuple[str, str]]:
        """Id and question of the step's episodes, all of which are logged."""
        lines = (self.folder / "episodes" / f"step_{step}.jsonl").read_text().splitlines()
        found = [(record["episode_id"], record["question"]) for record in map(json.loads, lines)]
        if len(set(found)) != NUM_EPISODES:
            raise DrillFailedError(f"step {step} has {len(set(found))} episodes, expected {NUM_EPISODES}")
        return found

    def command_now(self) -> Command:
        assert self.command is not None
        return self.command

    def end(self) -> None:
        if self.command is not None:
            self.command.end()
        for pid in marked_processes(self.folder):
            kill(pid)


def hit(run: TrainingRun, fault: Fault) -> Outcome:
    """Kills or freezes a process in the middle of a step, just after another one, and waits for what happens."""
    step = run.last_step()
    victims = find(run.folder, fault.title)
    if not victims:
        raise DrillFailedError(f"no process of {run.folder} is called {fault.title}")
    kill(victims[0], fault.number)
    if fault.restarts:
        run.wait_for_log(RESTART, bound_s=fault.bound_s)
        seconds = run.wait_for_step(step + 1, bound_s=fault.bound_s)
        message, what = run.command_now().line_with(RESTART), "restarted by itself"
        if fault.named not in message:
            raise DrillFailedError(
                f"expected {fault.named!r} in the message of {run.command_now().log}, found: {message}"
            )
    else:
        seconds = run.wait_for_end(code=1, bound_s=fault.bound_s)
        message, what = told(run, fault), "stopped; resumed"
    return Outcome(fault.name, what, seconds, message)


def told(run: TrainingRun, fault: Fault) -> str:
    """The message of a run that has stopped; it names what happened, and stands in the run folder too.

    Raises:
        DrillFailedError: it does not.
    """
    message = run.command_now().message()
    if missing := [words for words in (fault.named, "resume=true") if words not in message]:
        raise DrillFailedError(f"expected {missing[0]!r} in the message of {run.command_now().log}, found: {message}")
    recorded = json.loads((run.folder / FAILURE).read_text())["message"]
    if fault.named not in recorded:
        raise DrillFailedError(f"expected {fault.named!r} in {run.folder / FAILURE}, found: {recorded}")
    return message


def kill_driver(run: TrainingRun) -> Outcome:
    """The process that the user started dies without a word; everything else must follow."""
    run.kill_driver()
    return Outcome("driver", "all processes gone; resumed", run.wait_for_processes(), "")


def lose_replica(run: TrainingRun, replica: Retriever) -> Outcome:
    """One of two retrieval servers dies; the other takes over."""
    step = run.last_step()
    replica.kill()
    seconds = run.wait_for_step(step + 2, bound_s=2 * STEP_BOUND_S)  # the one in progress, and a whole one
    return Outcome("one of two retrievers", "the other took over", seconds, "two steps later")


def lose_retrievers(run: TrainingRun, replicas: Sequence[Retriever]) -> Outcome:
    """Every retrieval server is gone for a while; searches wait."""
    step = run.last_step()
    for replica in replicas:
        replica.kill()
    time.sleep(OUTAGE_S)
    for replica in replicas:
        replica.start()
    seconds = run.wait_for_step(step + 2, bound_s=2 * STEP_BOUND_S)
    return Outcome("all retrievers", "searches waited", seconds, f"of {OUTAGE_S:g} s outage and two steps")


def fill_disk(run: TrainingRun, disk: Path) -> Outcome:
    """No byte is left on the run folder's file system; then there is room again."""
    with filled(disk):
        seconds = run.wait_for_end(code=1, bound_s=2 * STEP_BOUND_S)
    message = run.command_now().message()
    if not any(words in message for words in ("No space left on device", "the disk is full")):
        raise DrillFailedError(f"expected the full disk in the message of {run.command_now().log}, found: {message}")
    return Outcome("full disk", "stopped; resumed", seconds, message)


def compare(run: TrainingRun, straight: TrainingRun, *, num_steps: int) -> str:
    """What the run that was hit lost, against one that was left alone.

    Returns:
        "nothing", with the evidence.

    Raises:
        DrillFailedError: a step is missing or there twice, or an episode, a metric or a weight differs.
    """
    for each in (run, straight):
        check_records(each, num_steps=num_steps)
    for step, (ours, theirs) in enumerate(zip(run.records(), straight.records(), strict=True), start=1):
        if run.episodes(step) != straight.episodes(step):
            raise DrillFailedError(f"step {step} played other episodes than the run that was left alone")
        differing = [name for name, value in theirs.items() if repeatable(name) and not close(ours.get(name), value)]
        if differing:
            raise DrillFailedError(
                f"step {step}: {differing[0]} is {ours.get(differing[0])}, not {theirs[differing[0]]}"
            )
    difference = max_difference(run.folder / "model", straight.folder / "model")
    if difference > TOLERANCE:
        raise DrillFailedError(f"the weights differ by {difference:g} from those of the run that was left alone")
    return f"nothing: {num_steps} steps, {num_steps * NUM_EPISODES} episodes and the weights equal (to {difference:g})"


def check_records(run: TrainingRun, *, num_steps: int) -> str:
    """Whether every step and every episode is there, once. Returns "nothing" was lost, with the evidence.

    Raises:
        DrillFailedError: one is missing, or there twice.
    """
    steps = [record["step"] for record in run.records()]
    if steps != list(range(1, num_steps + 1)):
        raise DrillFailedError(f"{run.folder}: expected steps 1 to {num_steps}, once each, found {steps}")
    ids = [episode for step in range(1, num_steps + 1) for episode in run.episodes(step)]
    if len(set(ids)) != num_steps * NUM_EPISODES:
        raise DrillFailedError(f"{run.folder}: {len(set(ids))} different episodes in {len(ids)} records")
    return f"nothing: {num_steps} steps and {len(ids)} episodes, each once"


def repeatable(metric: str) -> bool:
    return not any(part in OF_THE_MOMENT for part in metric.split("/"))


def close(ours: float | None, theirs: float) -> bool:
    return ours is not None and (abs(ours - theirs) <= TOLERANCE or (ours != ours and theirs != theirs))


def max_difference(ours: Path, theirs: Path) -> float:
    """The largest difference of a weight between two model folders."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    if left.keys() != right.keys():
        return math.inf
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def drill(world: World, out: Path) -> Iterator[Outcome]:
    """All faults, one after the other, on one run; then the comparison."""
    out.mkdir(parents=True, exist_ok=True)
    with small_disk(out / "disk") as disk:
        if disk is None:
            yield Outcome("full disk", "NOT RUN: mounting a small disk needs root", 0.0, "", "-")
        run = TrainingRun((disk or out) / "run", world.overrides, logs=out)
        try:
            yield from (replace(outcome, lost="see the last line") for outcome in _all_faults(run, world, disk))
            run.start()
            run.wait_for_end(code=0, bound_s=START_BOUND_S)
            straight = TrainingRun(out / "straight", world.overrides, logs=out)
            straight.start()
            straight.wait_for_end(code=0, bound_s=START_BOUND_S)
            lost = compare(run, straight, num_steps=NUM_STEPS)
            yield Outcome("all of them", f"{run.num_commands} commands made one run", 0.0, "", lost)
        finally:
            run.end()


def _all_faults(run: TrainingRun, world: World, disk: Path | None) -> Iterator[Outcome]:
    first, second = world.retrievers
    run.start(*NO_RESTART)
    run.wait_until_it_works()
    yield lose_replica(run, first)
    yield lose_retrievers(run, [second])
    first.start()
    if disk is not None:
        yield fill_disk(run, disk)
        run.start(*NO_RESTART)
        run.wait_until_it_works()
    yield kill_driver(run)
    for fault in FAULTS:
        run.start(*fault.overrides)
        run.wait_until_it_works()
        yield hit(run, fault)
        run.end()  # a run that went on by itself has the settings of this fault
        run.wait_for_processes()
