"""What the launcher can be told, checked before anything is written or submitted."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgpo.config.load import chosen, load_config
from dgpo.config.ranges import RANGES
from dgpo.config.schema import Config
from dgpo.config.stages import STAGES, stage_model
from dgpo.errors import ConfigError, Parser

MIN_LEAD_S = 120  # scripts/slurm/job.sh keeps 60 s of it for itself
MAX_LEAD_S = 65535  # sbatch's own limit
MAX_NODE_TMP_CHARS = 25
SEARCHING = ("collect", "train", "test")
RUN_DIR = "{run_dir}"  # in an override; scripts/slurm/job.sh puts the run's own folder there


@dataclass(frozen=True)
class JobOptions:
    """A chain of stages.

    Attributes:
        config: of the whole chain; a stage on fewer nodes gets an override of its own.
        overrides: the user's `key=value`.
        run_dir: absolute; with several seeds, each has a folder below it.
        times, nodes: by stage; a stage that `times` lacks has the limit in its sbatch file.
        retriever: arguments of retriever.serve; "" where the stages need none, or one runs elsewhere.
        node_tmp: a folder of each node's own, under one path.
        lead_s: seconds between SLURM's warning and the time limit.
        flags: more options of sbatch, name -> value ("" for none).
    """

    config: Config
    overrides: tuple[str, ...]
    run_dir: Path
    stages: tuple[str, ...]
    times: Mapping[str, str]
    nodes: Mapping[str, int]
    seeds: tuple[int, ...]
    activate: str
    container: str
    retriever: str
    retriever_activate: str
    retriever_nodes: int
    node_tmp: Path
    lead_s: int
    retries: int
    flags: Mapping[str, str]
    dry_run: bool


def parse_options(arguments: Sequence[str] | None) -> JobOptions:
    """Options of a command line.

    Raises:
        ConfigError: an option or override that cannot be.
    """
    given = _make_parser().parse_intermixed_args(arguments)
    wrong = [override for override in given.overrides if "=" not in override]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is neither an option nor key=value; --help lists the options")
    run_dir = _run_dir(load_config([override for override in given.overrides if RUN_DIR not in override]))
    config = load_config([override.replace(RUN_DIR, str(run_dir)) for override in given.overrides])
    stages = _stages(given.stages, config)
    options = JobOptions(
        config=config,
        overrides=tuple(given.overrides),
        run_dir=run_dir,
        stages=stages,
        times=_times(given.time, stages),
        nodes=_nodes(given.nodes, stages, config),
        seeds=_seeds(given.seeds, given.overrides),
        activate=given.activate,
        container=given.container,
        retriever=given.retriever,
        retriever_activate=given.retriever_activate or given.activate,
        retriever_nodes=given.retriever_nodes,
        node_tmp=_node_tmp(given.node_tmp),
        lead_s=given.lead_s,
        retries=given.retries,
        flags=_flags(given),
        dry_run=given.dry_run,
    )
    _check_lead(options)
    _check_directive("the working directory", str(Path.cwd()))
    if re.search(r"[\"'\\\n]", options.container):
        raise ConfigError(f"--container {options.container!r} is cut at its blanks: expected no quotes, no backslashes")
    _check_retriever(options)
    _check_overrides(options)
    return options


def config_of(options: JobOptions, stage: str) -> Config:
    """The configuration of one stage, on its own number of nodes."""
    hardware = replace(options.config.hardware, num_nodes=options.nodes[stage])
    return replace(options.config, hardware=hardware)


def seconds(time: str) -> int:
    """A time limit in one of SLURM's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise ConfigError(f"--time {time}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if parts[2] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m dgpo.slurm",
        description="Submits the stages of a run to SLURM, each after the one before it; docs/slurm.md. Everything "
        "that is no option goes to the stages: pair=qwen3b_05b hardware=h200x8xN hardware.num_nodes=4 run_dir=...",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="as for `python -m dgpo train`")
    add("--dry-run", action="store_true", help="print the scripts and the sbatch commands, write and submit nothing")
    add("--stages", metavar="A,B", help="of collect,distill,train,test (default: the experiment's stages, then test)")
    add("--partition", help="as of sbatch")
    add("--account", help="as of sbatch")
    add("--qos", help="as of sbatch")
    add("--sbatch", action="append", default=[], metavar="--FLAG=VALUE", help="any other flag of sbatch; repeatable")
    per_stage: dict[str, Any] = {"action": "append", "default": [], "metavar": "[STAGE=]VALUE"}
    add("--time", **per_stage, help="limit; a stage that needs longer continues in a next turn (default: its sbatch's)")
    add("--nodes", **per_stage, help="nodes of a stage (default: hardware.num_nodes)")
    add("--seeds", metavar="1,2,3", help="an array: one run for each, in run_dir/seed1, ...")
    add("--activate", default="", metavar="LINE", help="enters the environment, e.g. 'source .venv/bin/activate'")
    add("--container", default="", metavar="COMMAND", help="put before each, e.g. 'apptainer exec --nv dgpo.sif'")
    add("--retriever", default="", metavar="ARGUMENTS", help="of retriever.serve, e.g. '--index wiki=indexes/wiki18'")
    add("--retriever-activate", default="", metavar="LINE", help="its environment (default: --activate)")
    add("--retriever-nodes", type=int, default=1, metavar="N", help="that serve it, the first of each job (default: 1)")
    add("--node-tmp", default="/tmp", metavar="FOLDER", help="of each node's own, for Ray (default: %(default)s)")
    add("--lead-s", type=int, default=600, help="seconds that a step and its saving may take (default: %(default)s)")
    add("--retries", type=int, default=2, help="attempts after a failure, per stage and run (default: %(default)s)")
    return parser


def _stages(given: str | None, config: Config) -> tuple[str, ...]:
    stages = tuple(given.split(",")) if given else (*config.stages, "test")
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stages {given}: unknown stage {stage!r}, expected some of {', '.join(STAGES)}")
    if len(set(stages)) < len(stages):
        raise ConfigError(f"--stages {given}: each at most once")
    return stages


def _run_dir(config: Config) -> Path:
    run_dir = Path(config.run_dir).absolute()
    if not re.fullmatch(r"[\w./+@:-]+", str(run_dir)):
        raise ConfigError(f"run_dir={run_dir} is to be read by bash and Hydra: use letters, digits and ._+@:- only")
    return run_dir


def _node_tmp(given: str) -> Path:
    folder = Path(given)
    if not folder.is_absolute() or len(given) > MAX_NODE_TMP_CHARS or not re.fullmatch(r"[\w./+@:-]+", given):
        raise ConfigError(
            f"--node-tmp {given}: expected an absolute path of at most {MAX_NODE_TMP_CHARS} characters, because the "
            "kernel limits the names of Ray's sockets below it"
        )
    return folder


def _by_stage(name: str, given: Sequence[str], stages: Sequence[str]) -> dict[str, str]:
    """`VALUE` for all stages, `STAGE=VALUE` for one, the later ones win."""
    values: dict[str, str] = {}
    for each in given:
        stage, separator, value = each.rpartition("=")
        if separator and stage not in stages:
            raise ConfigError(f"--{name} {each}: {stage!r} is none of the stages, {', '.join(stages)}")
        values |= {stage: value} if separator else dict.fromkeys(stages, each)
    return values


def _times(given: Sequence[str], stages: Sequence[str]) -> dict[str, str]:
    times = _by_stage("time", given, stages)
    for time in times.values():
        seconds(time)
    return times


def _nodes(given: Sequence[str], stages: Sequence[str], config: Config) -> dict[str, int]:
    configured = config.hardware.num_nodes
    nodes = dict.fromkeys(stages, configured)
    for stage, value in _by_stage("nodes", given, stages).items():
        if not value.isdecimal() or not 1 <= int(value) <= configured:
            raise ConfigError(
                f"--nodes {value} for {stage}: expected 1 to hardware.num_nodes={configured}, the nodes that the run "
                "is configured for"
            )
        nodes[stage] = int(value)
    return nodes


def _seeds(given: str | None, overrides: Sequence[str]) -> tuple[int, ...]:
    if given is None:
        return ()
    texts = given.split(",")
    if not all(text.isdecimal() for text in texts) or len(set(texts)) < len(texts):
        raise ConfigError(f"--seeds {given}: expected different whole numbers, e.g. --seeds 1,2,3")
    if beyond := [text for text in texts if int(text) not in RANGES["seed"]]:
        raise ConfigError(f"--seeds {given}: {beyond[0]} is not {RANGES['seed']}")
    if chosen("seed", overrides):
        raise ConfigError(f"--seeds {given} with seed={chosen('seed', overrides)}: leave one of them out")
    return tuple(map(int, texts))


def _flags(given: argparse.Namespace) -> dict[str, str]:
    flags = {name: getattr(given, name) for name in ("partition", "account", "qos") if getattr(given, name)}
    for name, value in flags.items():
        _check_directive(f"--{name}", value)
    for flag in given.sbatch:
        name, _, value = flag.partition("=")
        if not re.fullmatch(r"--[a-z][\w-]*", name):
            raise ConfigError(f"--sbatch {flag}: expected a long flag, e.g. --sbatch=--constraint=h200")
        _check_directive(f"--sbatch={name}", value)
        flags[name[2:]] = value
    return flags


def _check_directive(name: str, value: str) -> None:
    """That sbatch can read the value from a line of its script, in which only quotes around all of it are sure."""
    if not value.isprintable() or re.search(r"[\"'\\]", value):
        raise ConfigError(f"{name} {value!r}: a line for sbatch holds no quotes, backslashes or line breaks in a value")


def _check_lead(options: JobOptions) -> None:
    if not MIN_LEAD_S <= options.lead_s <= MAX_LEAD_S:
        raise ConfigError(f"--lead-s {options.lead_s}: expected {MIN_LEAD_S} to {MAX_LEAD_S} seconds")
    if options.retries < 0:
        raise ConfigError(f"--retries {options.retries}: expected at least 0")
    for stage, time in options.times.items():
        if seconds(time) <= options.lead_s:
            raise ConfigError(
                f"--time {time} for {stage} is not longer than --lead-s {options.lead_s}, the warning before its end: "
                "no step would be made; raise the one or lower the other"
            )


def _check_retriever(options: JobOptions) -> None:
    url = chosen("retriever.url", options.overrides)
    if options.retriever and url:
        raise ConfigError(f"--retriever starts servers, and retriever.url={url} names others: leave one of them out")
    searching = [stage for stage in options.stages if needs_retriever(options.config, stage)]
    if searching and not options.retriever and not url and not options.config.retriever.backend:
        raise ConfigError(
            f"{', '.join(searching)} search: add --retriever '--index wiki=indexes/wiki18' to serve an index within "
            "the job, or retriever.url=http://... of a server that runs elsewhere"
        )
    try:
        shlex.split(options.retriever)
    except ValueError as error:
        raise ConfigError(f"--retriever {options.retriever}: {error}") from error
    if "\n" in options.retriever:
        raise ConfigError(f"--retriever {options.retriever!r}: expected one line")
    if options.retriever and not 1 <= options.retriever_nodes <= min(options.nodes.values()):
        raise ConfigError(
            f"--retriever-nodes {options.retriever_nodes}: expected 1 to {min(options.nodes.values())}, the nodes of "
            "the smallest job"
        )


def needs_retriever(config: Config, stage: str) -> bool:
    """Whether a stage plays episodes."""
    return stage in SEARCHING or (stage == "distill" and config.distill.loss == "distillm")


def _check_overrides(options: JobOptions) -> None:
    if options.config.dry_run:
        raise ConfigError("dry_run=true is an override of the stages: --dry-run prints the jobs")
    if "test" in options.stages and not options.config.test.models and not _trained(options):
        raise ConfigError("test.models is empty and no stage before the test trains: add test.models.NAME=PATH")


def _trained(options: JobOptions) -> list[str]:
    return [stage for stage in options.config.stages if stage in ("distill", "train")]


def tested_model(options: JobOptions) -> list[str]:
    """What `test` evaluates where the user names nothing: the model of the run's last training stage."""
    if options.config.test.models:
        return []
    name = chosen("experiment", options.overrides) or "dgpo"
    model = stage_model(options.config, _trained(options)[-1]).relative_to(options.config.run_dir)
    return [f"test.models.{name}={RUN_DIR}/{model}"]
