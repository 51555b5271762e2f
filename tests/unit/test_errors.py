"""The tree of errors: how a command's end is told, with which exit code, and that it survives pickling."""

import ast
import pickle
from importlib import import_module
from pathlib import Path

import pytest

from dgpo.__main__ import COMMANDS
from dgpo.errors import (
    CollapseError,
    ConfigError,
    DataError,
    DgpoError,
    FaultError,
    NonFiniteError,
    RunStoppedError,
    StoppedOnRequestError,
    StopRequested,
    exit_code,
)

ROOT = Path(__file__).resolve().parents[2]


def ended(error, **options):
    def work():
        raise error

    return exit_code("dgpo train", work, **options)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DgpoError("why"), 1),
        (RunStoppedError("why"), 1),
        (FaultError("why"), 1),
        (OSError(2, "why"), 1),
        (ConfigError("why"), 2),
        (DataError("why"), 2),
        (StopRequested("why"), 75),
        (StoppedOnRequestError("why"), 75),
    ],
)
def test_what_a_user_can_act_on_is_one_line_and_its_exit_code(error, code, capsys):
    assert ended(error) == code
    assert capsys.readouterr().err == f"dgpo train: {error}\n"


def test_the_log_of_what_failed_stands_below_the_line(capsys):
    assert ended(DgpoError("stage x\n  failed:", ["its last", "lines"])) == 1
    assert capsys.readouterr().err == "dgpo train: stage x failed:\nits last\nlines\n"


def test_a_stage_says_how_it_is_continued(capsys):
    assert ended(OSError(28, "No space left on device"), resumes=True) == 1
    assert ended(KeyboardInterrupt(), resumes=True) == 130
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines() == [
        "dgpo train: [Errno 28] No space left on device; when that is corrected, repeat the command with resume=true",
        "dgpo train: interrupted; resume=true continues",
        "dgpo train: interrupted",
    ]


def test_our_own_mistake_is_the_whole_traceback_and_70(capsys):
    assert ended(KeyError("ours")) == 70
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "in work" in told
    assert told.endswith(
        "KeyError: 'ours'\ndgpo train: this is a mistake of the program: please report the lines above\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        CollapseError("why", 7),
        NonFiniteError("why", "values"),
        FaultError("why", ["its last line"]),
        RunStoppedError("why", kind="DiskFullError"),
        StoppedOnRequestError("why"),
    ],
)
def test_what_stops_a_trainer_survives_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), "why", vars(error))


def test_every_command_is_a_function_that_is_there():
    for command in COMMANDS.values():
        module, _, function = command.work.partition(":")
        assert callable(getattr(import_module(module), function))


def test_an_error_of_its_own_is_caught_by_name_or_brings_an_exit_code():
    """Another class is one more name to know: the common ones serve wherever nobody tells errors apart."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "dgpo").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Requested"))]
    caught = {
        name.id
        for node in nodes
        if isinstance(node, ast.ExceptHandler) and node.type
        for name in ast.walk(node.type)
        if isinstance(name, ast.Name)
    }
    for each in classes:
        has_code = any(isinstance(line, ast.Assign) and line.targets[0].id == "exit_code" for line in each.body)
        assert has_code or each.name in caught, f"{each.name}: use DgpoError, ConfigError or DataError"
    assert len(classes) <= 14
