"""Why a command ends before its time: one tree of errors, which carry their exit codes, and how they are told."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

INTERRUPTED = 130
OUR_MISTAKE = 70  # EX_SOFTWARE of sysexits.h


class DgpoError(Exception):
    """A command stops for a reason that its user can act on: the message says what is wrong, and what to do.

    Attributes:
        exit_code: with which the command ends.
        log: the last lines that a process wrote which failed.
    """

    exit_code = 1

    def __init__(self, message: str = "", log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = list(log)

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(DgpoError, ValueError):
    """The command or its configuration cannot run; nothing was started, and nothing that was there is touched."""

    exit_code = 2


class DataError(DgpoError, ValueError):
    """A file or folder is missing, incomplete, or does not hold what is expected there."""

    exit_code = 2


class RunStoppedError(DgpoError, RuntimeError):
    """The trainer stopped for a reason that its user can act on. Survives pickling between Ray's processes.

    Attributes:
        kind: what `failure.json` calls it.
    """

    def __init__(self, message: str = "", log: Sequence[str] = (), *, kind: str | None = None) -> None:
        super().__init__(message, log)
        self.kind = kind or type(self).__name__


class CollapseError(RunStoppedError):
    """The run is to go back to before `first_step`, the first step that the trouble may have touched."""

    def __init__(self, message: str, first_step: int) -> None:
        super().__init__(message)
        self.args, self.first_step = (message, first_step), first_step


class NonFiniteError(RunStoppedError):
    """`tensor` of the batch is not finite; nothing was updated with it."""

    def __init__(self, message: str, tensor: str) -> None:
        super().__init__(message)
        self.args, self.tensor = (message, tensor), tensor


class FaultError(RunStoppedError):
    """A process of the run died or hangs. `log` holds the last lines that it wrote."""


class StoppedOnRequestError(DgpoError, RuntimeError):
    """A training that saved its state and ended on request; survives pickling between Ray's processes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, by which scripts/slurm knows that resume=true continues


class StopRequested(BaseException):
    """Ends the process like KeyboardInterrupt: nothing that retries or reports errors may catch it."""

    exit_code = StoppedOnRequestError.exit_code


class Parser(argparse.ArgumentParser):
    """Options of a command; a wrong one is told as every other mistake is, in one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Every way of parsing calls it."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make an empty list of it
                self.error(f"{word}: expected a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ConfigError(f"{message}; --help lists the options")


def one_line(error: object) -> str:
    """The whole text of an error, in one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_code(name: str, work: Callable[[], object], *, resumes: bool = False) -> int:
    """Runs a command; whatever it raises is told in words.

    A reason that the user can act on is one line, and the log of what failed. What is left is our own mistake: the
    whole traceback, and `OUR_MISTAKE`.

    Args:
        name: of the command, in front of the line.
        resumes: whether `resume=true` continues it.

    Returns:
        The exit code of the process: 0 done.
    """
    try:
        work()
    except (DgpoError, StopRequested) as error:
        _tell(name, error)
        print("".join(f"{line}\n" for line in getattr(error, "log", ())), end="", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        _tell(name, f"{error}; when that is corrected, repeat the command with resume=true" if resumes else error)
        return DgpoError.exit_code
    except KeyboardInterrupt:
        _tell(name, "interrupted; resume=true continues" if resumes else "interrupted")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        _tell(name, "this is a mistake of the program: please report the lines above")
        return OUR_MISTAKE
    return 0


def _tell(name: str, what: object) -> None:
    print(f"{name}: {one_line(what)}", file=sys.stderr)
