"""Signals that ask a stage to stop: what is raised, what is written, and what was there before comes back."""

import asyncio
import os
import signal

import pytest

from dgpo.__main__ import main
from dgpo.errors import StoppedOnRequestError, StopRequested
from dgpo.runs.stopping import cancel_on_signal, raise_on_signal, stop_file_on_signal, stop_requested


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_raises_and_the_handler_before_it_comes_back(number):
    before = signal.getsignal(number)
    with pytest.raises(StopRequested, match=f"{number.name}; resume=true continues"), raise_on_signal():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_first_signal_leaves_a_file_and_the_second_one_raises(tmp_path):
    seen = []

    def run():
        with stop_file_on_signal(tmp_path):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                seen.append(stop_requested(tmp_path))
                signal.raise_signal(number)

    with pytest.raises(StopRequested, match="SIGTERM"):
        run()
    assert seen == [False, True]
    assert not stop_requested(tmp_path)


def test_a_request_that_a_killed_run_left_is_forgotten(tmp_path):
    with stop_file_on_signal(tmp_path):
        signal.raise_signal(signal.SIGUSR1)
        left = (tmp_path / "stop_requested").read_bytes()
    (tmp_path / "stop_requested").write_bytes(left)
    with stop_file_on_signal(tmp_path):
        assert not stop_requested(tmp_path)


def test_a_signal_cancels_the_task_after_its_own_cleaning_up():
    ended = []

    async def play():
        with cancel_on_signal():
            try:
                asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(30)
            finally:
                ended.append("closed")

    with pytest.raises(StopRequested, match="SIGUSR1"):
        asyncio.run(play())
    assert ended == ["closed"]


def test_a_cancellation_without_a_signal_stays_one():
    async def play():
        with cancel_on_signal():
            asyncio.current_task().cancel()
            await asyncio.sleep(30)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(play())


@pytest.mark.parametrize("stop", [StopRequested("ended by SIGTERM"), StoppedOnRequestError("stopped after step 7")])
def test_a_command_that_stopped_on_request_exits_with_75(stop, monkeypatch, capsys):
    def stopped(_):
        raise stop

    monkeypatch.setattr("dgpo.rl.train.train", stopped)
    assert main(["train"]) == 75
    assert str(stop) in capsys.readouterr().err
