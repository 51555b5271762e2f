"""What the commands share: options that are checked as they are read, and how a command ends."""

from __future__ import annotations

import argparse
import math
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from retriever.errors import RetrieverError

OUR_MISTAKE = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
MAX_INT = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """The options of `python -m retriever.<name>`; a wrong one is told in one line."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m retriever.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}; --help lists what there is\n")


def whole_number(least: int, most: int = MAX_INT) -> Callable[[str], int]:
    """A type for argparse: a whole number in a range, both ends included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return value

    return parse


def real_number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite number in a range, both ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}")
        return value

    return parse


def device(text: str) -> str:
    """A type for argparse: where models and indexes run; whether there is one is for `check_device` to say."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; expected cpu, cuda or cuda:N")
    return text


def run(name: str, command: Callable[[], Any]) -> None:
    """Runs a command; whatever it raises ends the process in words.

    A user's mistake is one line and its exit code. What is left is ours: the whole traceback, and `OUR_MISTAKE`.
    """
    try:
        command()
    except (RetrieverError, OSError) as error:
        told = "; ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"retriever.{name}: {' '.join(told.split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", RetrieverError.exit_code))
    except KeyboardInterrupt as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        print(f"retriever.{name}: interrupted{notes}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        print(f"retriever.{name}: this is a mistake of the program: please report the lines above", file=sys.stderr)
        sys.exit(OUR_MISTAKE)
