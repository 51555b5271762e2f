"""`dgpo doctor`: each line is ok or says what to do."""

from dataclasses import replace

import pytest

from dgpo.__main__ import main
from dgpo.config.load import load_config
from dgpo.errors import DgpoError
from dgpo.hardware import doctor as module
from dgpo.hardware.doctor import differing, doctor, locked, share_tensor
from tests.unit.test_machine import H200, NODE


@pytest.fixture
def seen(monkeypatch, capsys):
    """The lines on a machine, with probes that end in `failure`."""

    def look(machine, failure=None):
        monkeypatch.setattr(module, "this_machine", lambda: machine)
        monkeypatch.setattr(module, "_run", lambda *_: failure)
        monkeypatch.setattr(module, "hub_answers", lambda: False)
        well = True
        try:
            doctor(load_config([]))
        except DgpoError:
            well = False
        return well, {line[4:].split()[0]: line for line in capsys.readouterr().out.splitlines()}

    return look


def test_a_node_with_all_it_needs_is_well(seen):
    well, lines = seen(NODE)
    assert well, lines
    assert all(line.startswith("ok") for line in lines.values())
    assert {"Python", "packages", "GPU", "driver", "CUDA", "flash-attn", "compiler", "hub", "disk"} <= lines.keys()


def test_what_is_wrong_says_what_to_do(seen):
    old = replace(NODE, gpus=[replace(H200, driver="550.54")], compiler=None, headers=None, shared_memory=64e6)
    well, lines = seen(old, failure="ImportError: undefined symbol")
    assert not well
    assert lines["driver"].startswith("FIX")
    assert "580 or newer" in lines["driver"]
    assert "--ipc=host" in lines["/dev/shm"]
    assert "install gcc" in lines["compiler"]
    assert "hardware.attention=sdpa" in lines["flash-attn"]
    assert "cannot reach an engine: ImportError: undefined symbol" in "".join(lines.values())


def test_a_laptop_is_well_without_gpus_and_is_told_the_group(seen):
    well, lines = seen(replace(NODE, gpus=[], compiler=None, headers=None))
    assert well
    assert "use hardware=cpu" in lines["GPUs"]


def test_packages_are_compared_with_the_lock():
    assert differing("cpu") == []
    assert "vllm" in differing("gpu")
    assert len(locked("gpu")) > 200


def test_a_tensor_reaches_another_process():
    assert share_tensor("cpu") is None


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dgpo 0.")
