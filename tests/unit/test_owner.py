"""One living command per stage folder: the second is refused, a dead one's place is taken, and by one only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpo.__main__ import main
from dgpo.errors import ConfigError
from dgpo.runs import owner
from dgpo.runs.owner import owned, refuse_if_owned

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from dgpo.errors import ConfigError
from dgpo.runs import owner
owner.BEAT_S = 0.05
folder = Path(sys.argv[1])
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
try:
    with owner.owned(folder):
        print("in", flush=True)
        time.sleep(float(sys.argv[2]))
except ConfigError as error:
    print(error, flush=True)
"""


def hold(folder, seconds=60.0, *, at=0.0):
    """A command that works in the folder for so long, from a moment on."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds), str(at)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "train"


@pytest.fixture
def holder(folder):
    process = hold(folder)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.communicate()


def claims(folder):
    return sorted(path.name for path in folder.parent.glob("train.owner.*"))


def elsewhere(folder):
    """Makes the claim one of another machine."""
    (path,) = folder.parent.glob("train.owner.*")
    text = {**json.loads(path.read_text()), "host": "n7", "view": ["another", "machine"]}
    path.write_text(json.dumps(text))
    return path


def test_a_second_command_is_refused_and_told_who_the_first_is(folder, holder):
    expected = rf"{folder} is in use by `dgpo .*` on {socket.gethostname()} \(process {holder.pid}, since 20"
    with pytest.raises(ConfigError, match=expected) as error, owned(folder):
        pass
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is in use by"):
        refuse_if_owned(folder)
    assert holder.poll() is None
    assert claims(folder) == ["train.owner.1"]


def test_another_stage_of_the_run_is_free(folder, holder):
    with owned(folder.with_name("test")):
        pass


def test_nothing_is_left_of_a_command_that_ended_or_failed(folder):
    with owned(folder):
        assert claims(folder) == ["train.owner.1"]
    assert claims(folder) == []
    with pytest.raises(ZeroDivisionError), owned(folder):
        _ = 1 / 0
    assert claims(folder) == []


def test_a_killed_commands_place_is_taken_at_once(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    refuse_if_owned(folder)
    with owned(folder):
        assert claims(folder) == ["train.owner.2"]
    assert time.monotonic() - started < 5
    assert claims(folder) == []


def test_a_process_that_has_the_number_of_a_dead_owner_is_not_it(folder, holder):
    (path,) = folder.parent.glob("train.owner.*")
    holder.kill()
    holder.wait()
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getppid()}))
    with owned(folder):
        pass


def test_a_zombie_is_dead(folder):
    process = hold(folder)
    assert process.stdout.readline() == "in\n"
    process.kill()
    while owner._start_time(process.pid) is not None:
        time.sleep(0.01)
    assert Path(f"/proc/{process.pid}").exists(), "nobody has waited for it"
    with owned(folder):
        pass
    process.communicate()


def test_a_living_owner_on_another_machine_is_known_by_its_beat(folder, holder):
    elsewhere(folder)
    with pytest.raises(ConfigError, match=r"is in use by .* on n7"), owned(folder):
        pass


def test_a_silent_owner_on_another_machine_is_watched_and_then_counts_as_dead(folder, holder, monkeypatch, capsys):
    holder.kill()
    holder.wait()
    elsewhere(folder)
    monkeypatch.setattr(owner, "SILENT_S", 1.5)
    started = time.monotonic()
    with owned(folder):
        pass
    assert time.monotonic() - started > 1.0
    assert "on n7" in capsys.readouterr().err
    assert claims(folder) == []


def test_an_owner_that_has_long_been_silent_is_not_waited_for(folder, holder):
    holder.kill()
    holder.wait()
    path = elsewhere(folder)
    long_ago = time.time() - 2 * owner.SILENT_S
    os.utime(path, (long_ago, long_ago))
    started = time.monotonic()
    with owned(folder):
        pass
    assert time.monotonic() - started < 5


def test_whoever_was_suspended_for_so_long_that_its_place_was_taken_ends_when_it_wakes(folder, holder, monkeypatch):
    holder.send_signal(signal.SIGSTOP)
    path = elsewhere(folder)
    os.utime(path, (1, 1))
    with owned(folder):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(timeout=20) == 1
        assert claims(folder) == ["train.owner.2"]
    assert "was taken over by" in holder.stderr.read()


@pytest.mark.parametrize("looked", ["before the other began", "when a dead claim had this name"])
def test_whoever_looked_too_early_does_not_win_over_one_that_is_there(folder, holder, monkeypatch, looked):
    (path,) = folder.parent.glob("train.owner.*")
    said, claims_now, wait = path.read_text(), owner._claims, owner._wait_until_dead
    seen = [[]] if looked == "before the other began" else []
    dead = [] if seen else [{"pid": 1}]
    monkeypatch.setattr(owner, "_claims", lambda folder: seen.pop() if seen else claims_now(folder))
    monkeypatch.setattr(owner, "_wait_until_dead", lambda *of: dead.pop() if dead else wait(*of))
    with pytest.raises(ConfigError, match="is in use by"), owned(folder):
        pass
    assert path.read_text() == said
    assert claims(folder) == ["train.owner.1"]


@pytest.mark.parametrize("found", ["nothing", "a dead claim"])
def test_of_many_that_start_at_the_same_time_one_wins(folder, found):
    if found == "a dead claim":
        process = hold(folder)
        process.stdout.readline()
        process.kill()
        process.communicate()
    moment = time.time() + 10
    processes = [hold(folder, seconds=5, at=moment) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert sorted(output == "in\n" for output in outputs) == [False, False, False, True], outputs
    assert claims(folder) == []


def test_the_command_is_refused_with_and_without_resume(folder, holder, capsys):
    for more in ([], ["resume=true"]):
        assert main(["train", "hardware=cpu", f"run_dir={folder.parent}", *more]) == 2
        assert f"{folder} is in use by" in capsys.readouterr().err
