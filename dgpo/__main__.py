"""`python -m dgpo <command> [key=value ...]`: every stage, one typed configuration, Hydra's override syntax."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

from dgpo import __version__
from dgpo.config.help import describe
from dgpo.config.load import load_config
from dgpo.config.release import with_positions
from dgpo.engines.environment import restart_with_environment
from dgpo.errors import exit_code

USAGE = """usage: python -m dgpo COMMAND [key=value ...]

{commands}

python -m dgpo COMMAND --help lists the settings that it reads; --version tells the version.
"""


class Command(NamedTuple):
    """One command.

    Attributes:
        work: `module:function`; takes the configuration, or the arguments as they were typed.
        summary: for `--help`.
        takes_config: which of the two.
        resumes: whether it is a stage that `resume=true` continues, and that ends in order when it is asked to stop.
    """

    work: str
    summary: str
    takes_config: bool = True
    resumes: bool = False


COMMANDS = {
    "quickstart": Command(
        "dgpo.pipeline.quickstart:quickstart",
        "the whole method on the tiny world, on a CPU: collect, distil, train, test, report",
        takes_config=False,
    ),
    "own": Command(
        "dgpo.pipeline.own:own",
        "FOLDER of documents and questions: an agent of your own, from a small model, on this machine",
        takes_config=False,
    ),
    "doctor": Command("dgpo.hardware.doctor:doctor", "this machine and environment, a line each: ok, or what to do"),
    "download": Command(
        "dgpo.data.download:download",
        "corpus, index, training set, benchmark files from the hub; resumable, checksummed",
    ),
    "prepare": Command(
        "dgpo.data.prepare:prepare",
        "question files and corpora: the paper's sets, or your own questions and documents",
    ),
    "contamination": Command(
        "dgpo.data.contamination:contamination",
        "duplicates, train/test overlap and answers in the question, as a report",
    ),
    "collect": Command(
        "dgpo.coldstart.collect:collect",
        "phase 1a: the teacher plays episodes, the correct ones are kept",
        resumes=True,
    ),
    "distill": Command(
        "dgpo.coldstart.distill:distill",
        "phase 1b: the student learns the kept episodes (cold start)",
        resumes=True,
    ),
    "train": Command(
        "dgpo.rl.train:train",
        "phase 2: PPO with the teacher on failed episodes (DGPO), and its baselines",
        resumes=True,
    ),
    "test": Command(
        "dgpo.evaluation.evaluate:evaluate",
        "episodes of checkpoints on test sets, greedy by default: EM, F1, searches, hits, with intervals",
        resumes=True,
    ),
    "arcap": Command(
        "dgpo.evaluation.arcap:arcap",
        "source referencing, using evidence, query rewriting, when to search; models and sets as in test",
        resumes=True,
    ),
    "reproduce": Command(
        "dgpo.pipeline.reproduce:reproduce",
        "a table of the paper, or figures: plans, runs what is missing; seeds=[1,2,3] for means and contrasts",
        takes_config=False,
    ),
    "ask": Command(
        "dgpo.ask.command:ask",
        '"question" ask.model=PATH: a checkpoint answers and shows how; ask.web=true opens a page',
        takes_config=False,
    ),
    "report": Command(
        "dgpo.evaluation.report:report",
        "report.html from what is in run_dir; report.runs=[a,b] draws their curves over its own",
    ),
    "export": Command(
        "dgpo.models.export:export",
        "the run's model as a folder with a model card; export.push=user/name sends it to the hub",
    ),
    "import": Command(
        "dgpo.models.importing:import_checkpoint",
        "a veRL or Search-R1 checkpoint as a Hugging Face folder: checkpoint=FOLDER out=FOLDER",
        takes_config=False,
    ),
    "compare": Command(
        "dgpo.evaluation.compare:write_comparison",
        "two run folders: configuration, metrics, paired tests; out=FILE.md",
        takes_config=False,
    ),
}


# What has a command of its own.
ELSEWHERE = {name: f"python -m retriever.{name}" for name in ("build", "convert", "serve")} | {
    "start": "python -m retriever.serve",
    "slurm": "python -m dgpo.slurm",
    "tinyworld": "python -m dgpo.tinyworld",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code (`dgpo.errors`): 0 done, 1 the run stopped, 2 the command, configuration or data are wrong, 70 a
        mistake of the program, 75 stopped on request, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        _show(_usage())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"dgpo {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(rest):
        _show(_help(name))
        return 0
    is_own_process = arguments == sys.argv[1:]
    return exit_code(f"dgpo {name}", lambda: _run(name, rest, is_own_process), resumes=COMMANDS[name].resumes)


def _run(name: str, arguments: Sequence[str], is_own_process: bool) -> None:
    from dgpo.runs.stopping import raise_on_signal, stopped_by_sigterm

    command = COMMANDS[name]
    config = load_config(with_positions(name, arguments)) if command.takes_config else None
    if config is not None and is_own_process:
        restart_with_environment(config.hardware)
    module, _, function = command.work.partition(":")
    work = getattr(import_module(module), function)
    with raise_on_signal() if command.resumes else stopped_by_sigterm():
        work(arguments if config is None else config)


def _show(text: str) -> None:
    """Prints help, of which `| head` may read a part."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()))


def _help(name: str) -> str:
    return f"usage: python -m dgpo {name} [key=value ...]\n\n{COMMANDS[name].summary}\n{describe(name)}"


if __name__ == "__main__":
    sys.exit(main())
