"""The watchdog over real Ray actors, killed by pid; no veRL, no engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import ray

from dgpo.engines.ray_cluster import forget_token, use_token
from dgpo.errors import FaultError, RunStoppedError
from dgpo.runs import watchdog as watchdogs
from dgpo.runs.watchdog import Watchdog, run_watched

pytestmark = pytest.mark.engine

LIMITS = {"start": 60.0, "rollout": 60.0, "update": 60.0, "sync": 60.0, "save": 60.0, "validate": 60.0}


class Worker:
    def pid(self) -> int:
        print("the last thing that the worker said", file=sys.stderr, flush=True)
        return os.getpid()

    def work(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture(scope="module")
def actor_class(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("ray")
    use_token(folder)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield ray.remote(num_cpus=0)(Worker)
    ray.shutdown()
    forget_token(folder)


@pytest.fixture
def worker(actor_class):
    actor = actor_class.remote()
    pid = ray.get(actor.pid.remote(), timeout=60)
    yield actor, pid
    ray.kill(actor)


def watched(actor, *, holds_weights: bool = False, **limits: float) -> Watchdog:
    watchdog = Watchdog({**LIMITS, **limits})
    watchdog.watch("agent-loop worker 0", actor, holds_weights=holds_weights)
    return watchdog


def hang() -> None:
    time.sleep(600)


def kill_soon(pid: int) -> None:
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()


def test_a_death_ends_a_wait_that_would_never_end(worker):
    actor, pid = worker
    watchdog = watched(actor)
    kill_soon(pid)
    started = time.monotonic()
    with pytest.raises(FaultError, match=rf"agent-loop worker 0 \(process {pid} on .*\) died in the start phase") as e:
        run_watched(hang, watchdog)
    assert time.monotonic() - started < 20
    assert "the last thing that the worker said" in "\n".join(e.value.log)


def test_a_busy_actor_is_not_taken_for_a_dead_one(worker):
    actor, _ = worker
    watchdog = watched(actor)
    actor.work.remote(3.0)
    run_watched(lambda: time.sleep(2.5), watchdog)
    assert watchdog.fault is None


def test_a_phase_that_takes_too_long_is_given_up(worker):
    watchdog = watched(worker[0], sync=1.0)

    def work() -> None:
        with watchdog.during("sync"):
            hang()

    with pytest.raises(FaultError, match=r"sync took longer than train\.limits\.sync_s=1"):
        run_watched(work, watchdog)


def test_the_outer_phase_has_its_time_again_after_an_inner_one():
    watchdog = Watchdog({**LIMITS, "update": 0.4})
    watchdog.enter("update")
    with watchdog.during("save"):
        time.sleep(0.5)
    watchdog.check()
    time.sleep(0.5)
    with pytest.raises(FaultError, match="update took longer"):
        watchdog.check()


def test_in_mid_rollout_the_trainer_saves_before_it_stops(worker):
    actor, pid = worker
    watchdog = watched(actor)
    saved = []

    def work() -> None:
        watchdog.enter("rollout")
        while watchdog.fault is None:
            time.sleep(0.05)
        with watchdog.during("save"):
            time.sleep(1.5)  # longer than a poll of the watchdog
            saved.append(True)
        raise watchdog.fault

    kill_soon(pid)
    with pytest.raises(FaultError, match="agent-loop worker 0"):
        run_watched(work, watchdog)
    assert saved


@pytest.mark.parametrize(("phase", "holds_weights"), [("rollout", True), ("update", False)])
def test_nothing_is_waited_for_where_nothing_can_be_saved(worker, phase, holds_weights):
    actor, pid = worker
    watchdog = watched(actor, holds_weights=holds_weights)

    def work() -> None:
        watchdog.enter(phase)
        hang()

    kill_soon(pid)
    with pytest.raises(FaultError, match="agent-loop worker 0"):
        run_watched(work, watchdog)


def test_an_error_is_explained_by_the_death_behind_it(worker):
    actor, pid = worker
    watchdog = watched(actor)

    def work() -> None:
        os.kill(pid, signal.SIGKILL)
        raise ValueError("an answer did not come")

    with pytest.raises(FaultError, match="agent-loop worker 0"):
        run_watched(work, watchdog)


def test_the_death_behind_a_lost_connection_is_waited_for(worker, monkeypatch):
    """Ray tells of a lost node long after its ranks' connections have closed."""
    monkeypatch.setattr(watchdogs, "DEATH_NOTICE_S", 0.0)
    actor, pid = worker
    watchdog = watched(actor)

    def work() -> None:
        threading.Timer(2.0, os.kill, (pid, signal.SIGKILL)).start()
        raise RuntimeError("Connection closed by peer [192.0.2.1]:25828")

    with pytest.raises(FaultError, match="agent-loop worker 0"):
        run_watched(work, watchdog)


def test_an_error_without_a_death_is_itself(worker, monkeypatch):
    monkeypatch.setattr(watchdogs, "DEATH_NOTICE_S", 0.5)

    def work() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        run_watched(work, watched(worker[0]))


def test_a_stop_of_the_trainer_is_passed_on():
    def work() -> None:
        raise RunStoppedError("an alarm")

    with pytest.raises(RunStoppedError, match="an alarm"):
        run_watched(work, Watchdog(LIMITS))


def test_work_that_ends_well_ends_well():
    run_watched(lambda: None, Watchdog(LIMITS))


def test_an_actor_that_the_run_itself_ends_is_no_fault(actor_class, monkeypatch):
    monkeypatch.setattr(watchdogs, "DEATH_NOTICE_S", 2.0)
    actor = actor_class.remote()
    ray.get(actor.pid.remote(), timeout=60)

    def work() -> None:
        ray.kill(actor)
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        run_watched(work, watched(actor))
