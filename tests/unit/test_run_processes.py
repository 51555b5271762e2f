import os
import signal
import subprocess
import sys
import time

from dgpo.runs.processes import end_processes, mark, marked_processes


def start(folder, code="import time; time.sleep(60)"):
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **mark(folder)})
    while process.pid not in marked_processes(folder):  # until the new program is in its place
        time.sleep(0.01)
    return process


def test_only_the_processes_of_the_run_are_found(tmp_path):
    ours, theirs = start(tmp_path / "a"), start(tmp_path / "ab")
    assert marked_processes(tmp_path / "a") == [ours.pid]
    for process in (ours, theirs):
        process.kill()
        process.wait()
    assert marked_processes(tmp_path / "a") == []


def test_what_does_not_end_in_time_is_killed_even_if_it_is_frozen(tmp_path):
    process = start(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    assert end_processes(tmp_path, grace_s=0.2) == 1
    assert process.wait(timeout=5) == -signal.SIGKILL


def test_what_ends_by_itself_is_waited_for(tmp_path):
    process = start(tmp_path, "import time; time.sleep(0.5)")
    started = time.monotonic()
    assert end_processes(tmp_path, grace_s=10) == 0
    assert time.monotonic() - started < 5
    assert process.wait(timeout=5) == 0
