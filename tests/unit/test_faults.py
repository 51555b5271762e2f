import errno
import json
import os

import pytest
import ray

from dgpo.config.load import load_config
from dgpo.errors import FaultError, RunStoppedError
from dgpo.rl.train import _after_fault
from dgpo.runs.faults import FAILURE, forget_failure, translated_ray_errors, write_failure


def raised_in_ray(error):
    """As the driver gets what a task raised."""
    return ray.exceptions.RayTaskError(
        "run", f"Traceback ...\n{type(error).__name__}: {error}", error
    ).as_instanceof_cause()


def test_the_trainers_own_stop_is_passed_on(tmp_path):
    with pytest.raises(FaultError, match="vLLM server 0 died") as info, translated_ray_errors(tmp_path):
        raise raised_in_ray(FaultError("vLLM server 0 died", ["its last line"]))
    assert info.value.log == ["its last line"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_told(tmp_path, error):
    message = r"the disk is full \(.* MB are free now\): make room, then resume=true"
    with pytest.raises(RunStoppedError, match=message), translated_ray_errors(tmp_path):
        raise raised_in_ray(error)


def test_what_nobody_foresaw_is_a_line_and_its_traceback_is_recorded(tmp_path):
    with pytest.raises(RunStoppedError) as caught, translated_ray_errors(tmp_path):
        raise raised_in_ray(AssertionError("foo is not supported\nand more"))
    line = f"the trainer raised AssertionError: foo is not supported; its traceback is in {tmp_path / FAILURE}"
    assert str(caught.value) == line
    assert caught.value.log == []
    write_failure(tmp_path, caught.value)
    record = json.loads((tmp_path / FAILURE).read_text())
    assert (record["kind"], record["message"]) == ("AssertionError", line)
    assert record["log"][-2:] == ["AssertionError: foo is not supported", "and more"]


def test_the_trainers_own_death_is_told(tmp_path):
    with pytest.raises(FaultError, match="the trainer's process died"), translated_ray_errors(tmp_path):
        raise ray.exceptions.ActorDiedError()


def test_the_failure_is_recorded_until_the_stage_goes_on(tmp_path):
    write_failure(tmp_path, RunStoppedError("an alarm"))
    record = json.loads((tmp_path / FAILURE).read_text())
    assert (record["kind"], record["message"]) == ("RunStoppedError", "an alarm")
    forget_failure(tmp_path)
    assert not (tmp_path / FAILURE).exists()
    forget_failure(tmp_path)


def test_a_run_is_restarted_as_often_as_it_may_be(tmp_path, capsys):
    config = load_config(["hardware=cpu", "train.max_restarts=1"])
    fault = FaultError("vLLM server 0 died", ["its last line"])
    assert _after_fault(config, tmp_path, fault, num_faults=1).resume
    told = capsys.readouterr().err
    assert "its last line" in told
    assert "vLLM server 0 died. There is no checkpoint yet; restart 1 of 1" in told
    with pytest.raises(RunStoppedError, match=r"vLLM server 0 died.*resume=true continues"):
        _after_fault(config, tmp_path, fault, num_faults=2)


def test_what_is_saved_is_told(tmp_path):
    for step in (2, 12):
        (tmp_path / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"global_step_{step}" / "manifest.json").touch()
    with pytest.raises(RunStoppedError, match="The last checkpoint is of step 12; resume=true"):
        _after_fault(load_config(["hardware=cpu", "train.max_restarts=0"]), tmp_path, FaultError("x"), num_faults=1)


def test_the_record_of_a_failure_has_the_dead_processs_last_lines(tmp_path):
    try:
        raise RunStoppedError("all of it") from FaultError("the cause", ["its last line"])
    except RunStoppedError as error:
        write_failure(tmp_path, error)
    record = json.loads((tmp_path / FAILURE).read_text())
    assert (record["kind"], record["message"], record["log"]) == ("FaultError", "all of it", ["its last line"])
