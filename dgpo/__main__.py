"""`python -m dgpo <command> [key=value ...]`: every stage, one typed configuration, Hydra's override syntax."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dgpo import __version__
from dgpo.config.load import GROUPS, ConfigError, config_keys, group_choices, load_config
from dgpo.config.schema import Config

USAGE = """usage: python -m dgpo COMMAND [key=value ...]

{commands}

python -m dgpo COMMAND --help lists the configuration; --version tells the version.
"""


class CommandFailedError(Exception):
    """A command that stopped for a reason its user can act on; the end of a stage's log may follow the message."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 the run stopped, 2 the command or configuration is wrong, 75 stopped on request
        (`dgpo.runs.stopping`), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"dgpo {__version__}")
        return 0
    name, *overrides = arguments
    if name not in COMMANDS:
        print(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run, summary = COMMANDS[name]
    if {"-h", "--help"} & set(overrides):
        print(_help(name, summary))
        return 0
    from dgpo.data.rows import DataError
    from dgpo.runs.artifacts import ManifestError, RunFolderExistsError
    from dgpo.runs.stopping import EXIT_STATUS, StoppedOnRequestError, StopRequested

    try:
        run(overrides)
    except (StopRequested, StoppedOnRequestError) as stop:
        print(f"dgpo {name}: {stop}", file=sys.stderr)
        return EXIT_STATUS
    except (ConfigError, DataError, RunFolderExistsError, ManifestError) as error:
        print(f"dgpo {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except CommandFailedError as error:
        print(f"dgpo {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; resume=true continues" if name in RESUMABLE else ""
        print(f"dgpo {name}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _quickstart(overrides: Sequence[str]) -> None:
    from dgpo.pipeline.processes import StageFailedError, stopped_by_sigterm
    from dgpo.pipeline.quickstart import quickstart

    try:
        with stopped_by_sigterm():
            quickstart(overrides)
    except StageFailedError as error:
        raise CommandFailedError(str(error)) from error


def _own(arguments: Sequence[str]) -> None:
    from dgpo.pipeline.own import own
    from dgpo.pipeline.processes import StageFailedError, stopped_by_sigterm

    try:
        with stopped_by_sigterm():
            own(arguments)
    except StageFailedError as error:
        raise CommandFailedError(f"{error}\nthe same command continues") from error


def _doctor(overrides: Sequence[str]) -> None:
    from dgpo.hardware.doctor import doctor

    if not doctor(load_config(overrides)):
        raise CommandFailedError("not all is well, see the lines above")


def _download(overrides: Sequence[str]) -> None:
    from dgpo.data.download import download
    from dgpo.data.hub import DownloadError

    try:
        download(load_config(overrides))
    except (DownloadError, OSError) as error:
        raise CommandFailedError(str(error)) from error


def _prepare(overrides: Sequence[str]) -> None:
    from dgpo.data.prepare import prepare

    try:
        prepare(load_config(overrides))
    except OSError as error:
        raise CommandFailedError(str(error)) from error


def _contamination(overrides: Sequence[str]) -> None:
    from dgpo.data.contamination import contamination

    try:
        contamination(load_config(overrides))
    except OSError as error:
        raise CommandFailedError(str(error)) from error


def _collect(overrides: Sequence[str]) -> None:
    from dgpo.coldstart.collect import collect
    from dgpo.coldstart.errors import NothingKeptError

    try:
        _play(collect, load_config(overrides))
    except NothingKeptError as error:
        raise CommandFailedError(str(error)) from error


def _distill(overrides: Sequence[str]) -> None:
    from dgpo.coldstart.distill import distill
    from dgpo.coldstart.errors import CheckpointMismatchError, DivergedError, RankLostError

    try:
        _play(distill, load_config(overrides))
    except CheckpointMismatchError as error:
        raise ConfigError(str(error)) from error
    except (DivergedError, RankLostError) as error:
        raise CommandFailedError(str(error)) from error


def _train(arguments: Sequence[str]) -> None:
    from dgpo.config.release import with_positions
    from dgpo.rl.train import TrainingFailedError, train
    from dgpo.runs.stopping import raised_on_request

    try:
        with raised_on_request():
            train(load_config(with_positions("train", arguments)))
    except TrainingFailedError as error:
        raise CommandFailedError(str(error)) from error
    except OSError as error:
        raise CommandFailedError(f"{error}; when that is mended, repeat the command with resume=true") from error


def _test(arguments: Sequence[str]) -> None:
    from dgpo.config.release import with_positions
    from dgpo.evaluation.evaluate import evaluate

    _play(evaluate, load_config(with_positions("test", arguments)))


def _arcap(overrides: Sequence[str]) -> None:
    from dgpo.evaluation.arcap import arcap

    _play(arcap, load_config(overrides))


def _ask(arguments: Sequence[str]) -> None:
    from dgpo.ask.asker import QuestionError
    from dgpo.ask.command import ask
    from dgpo.engines.vllm_policy import EngineStartError
    from dgpo.pipeline.processes import StageFailedError, stopped_by_sigterm

    try:
        with stopped_by_sigterm():
            ask(arguments)
    except QuestionError as error:
        raise ConfigError(str(error)) from error
    except (EngineStartError, StageFailedError, OSError) as error:
        raise CommandFailedError(str(error)) from error


def _report(overrides: Sequence[str]) -> None:
    from dgpo.evaluation.report import write_report

    config = load_config(overrides)
    if config.dry_run:
        print(f"dry run: {Path(config.run_dir) / 'report.html'} would be written from {config.run_dir}")
        return
    try:
        print(write_report(Path(config.run_dir), [Path(run) for run in config.report.runs]))
    except OSError as error:
        raise CommandFailedError(str(error)) from error


def _compare(arguments: Sequence[str]) -> None:
    from dgpo.evaluation.compare import write_comparison

    folders = [Path(argument) for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(folders) != 2 or set(options) - {"out"}:
        raise ConfigError(f"compare takes two run folders and out=FILE.md, not {' '.join(arguments) or 'nothing'}")
    try:
        path = write_comparison(*folders, out=Path(options["out"]) if "out" in options else None)
    except OSError as error:
        raise CommandFailedError(str(error)) from error
    print(f"written to {path}")


def _import(arguments: Sequence[str]) -> None:
    from dgpo.models.importing import import_checkpoint

    import_checkpoint(dict(argument.split("=", 1) if "=" in argument else (argument, "") for argument in arguments))


def _export(overrides: Sequence[str]) -> None:
    from dgpo.models.export import export
    from dgpo.models.push import PushError

    try:
        export(load_config(overrides))
    except (PushError, OSError) as error:
        raise CommandFailedError(str(error)) from error


def _reproduce(overrides: Sequence[str]) -> None:
    from dgpo.pipeline.processes import StageFailedError, stopped_by_sigterm
    from dgpo.pipeline.reproduce import reproduce

    try:
        with stopped_by_sigterm():
            reproduce(overrides)
    except StageFailedError as error:
        raise CommandFailedError(str(error)) from error


def _play(stage: Callable[[Config], object], config: Config) -> None:
    """A stage that plays episodes: an outage of the retriever, or a full disk, is for its user to mend."""
    from dgpo.engines.bounded_policy import EngineLostError
    from dgpo.engines.episode_runner import SearchOutageError
    from dgpo.engines.vllm_policy import EngineStartError
    from dgpo.runs.stopping import raised_on_request

    try:
        with raised_on_request():
            stage(config)
    except (SearchOutageError, EngineStartError, EngineLostError) as error:
        raise CommandFailedError(str(error)) from error
    except OSError as error:
        raise CommandFailedError(f"{error}; when that is mended, repeat the command with resume=true") from error


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "quickstart": (_quickstart, "the whole method on the tiny world, on a CPU: collect, distil, train, test, report"),
    "own": (_own, "FOLDER of documents and questions: an agent of your own, from a small model, on this machine"),
    "doctor": (_doctor, "this machine and environment, a line each: ok, or what to do"),
    "download": (_download, "corpus, index, training set, benchmark files from the hub; resumable, checksummed"),
    "prepare": (_prepare, "question files and corpora: the paper's sets, or your own questions and documents"),
    "contamination": (_contamination, "duplicates, train/test overlap and answers in the question, as a report"),
    "collect": (_collect, "phase 1a: the teacher plays episodes, the correct ones are kept"),
    "distill": (_distill, "phase 1b: the student learns the kept episodes (cold start)"),
    "train": (_train, "phase 2: PPO with the teacher on failed episodes (DGPO), and its baselines"),
    "test": (_test, "episodes of checkpoints on test sets, greedy by default: EM, F1, searches, hits, with intervals"),
    "arcap": (
        _arcap,
        "source referencing, using evidence, query rewriting, when to search; models and sets as in test",
    ),
    "reproduce": (
        _reproduce,
        "a table of the paper (table=main|ablation|pairs): plans, runs what is missing",
    ),
    "ask": (_ask, '"question" ask.model=PATH: a checkpoint answers and shows how; ask.web=true opens a page'),
    "report": (_report, "report.html from what is in run_dir; report.runs=[a,b] draws their curves over its own"),
    "export": (_export, "the run's model as a folder with a model card; export.push=user/name sends it to the hub"),
    "import": (_import, "a veRL or Search-R1 checkpoint as a Hugging Face folder: checkpoint=FOLDER out=FOLDER"),
    "compare": (_compare, "two run folders: configuration, metrics, paired tests; out=FILE.md"),
}


RESUMABLE = ("collect", "distill", "train", "test", "arcap")


def _usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:<13} {summary}" for name, (_, summary) in COMMANDS.items()))


def _help(name: str, summary: str) -> str:
    """The command, the groups with their choices, and every key with its default."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.structured(Config)
    groups = "\n".join(f"  {group}={'|'.join(group_choices(group))}" for group in GROUPS)
    keys = "\n".join(f"  {key}={_shown(OmegaConf.select(defaults, key))}" for key in config_keys())
    return (
        f"usage: python -m dgpo {name} [key=value ...]\n\n{summary}\n\n"
        f"groups of settings (configs/<group>/<choice>.yaml)\n{groups}\n\nkeys and their defaults\n{keys}"
    )


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
