"""The script of one stage: its file in scripts/slurm, with header and settings of a run filled in. Pure text."""

from __future__ import annotations

import shlex
from pathlib import Path

from dgpo.slurm.options import JobOptions, needs_retriever, tested_model

HOME = Path(__file__).resolve().parents[2]
TEMPLATES = HOME / "scripts" / "slurm"
DIRECTIVE = "#SBATCH --"


def render(options: JobOptions, stage: str, *, home: Path = HOME, folder: Path | None = None) -> str:
    """The sbatch script of `stage`.

    Args:
        home: the repository, under the same path on every node.
        folder: the directory that the user's relative paths are of; None: the present one.
    """
    lines = (TEMPLATES / f"{stage}.sbatch").read_text().splitlines()
    header = dict(_split(line.removeprefix(DIRECTIVE)) for line in lines if line.startswith(DIRECTIVE))
    first = lines.index(next(line for line in lines if line.startswith(DIRECTIVE)))
    body = [line for line in lines[first:] if not line.startswith(DIRECTIVE)]
    header |= _header(options, stage, folder or Path.cwd())
    exports = {name: value for name, value in _settings(options, stage, home).items() if value}
    return "\n".join(
        [
            *lines[:first],
            *(f"{DIRECTIVE}{name}{_quoted(value)}" for name, value in header.items()),
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *_arguments(options, stage),
            *body,
            "",
        ]
    )


def submission(stage_script: Path, after: str | None, *, array: bool) -> list[str]:
    """The sbatch command of a script, once job `after` has ended well; of an array, seed by seed."""
    command = ["sbatch", "--parsable"]
    if after is not None:
        kind = "aftercorr" if array else "afterok"
        command += [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, str(stage_script)]


def _split(directive: str) -> tuple[str, str]:
    name, _, value = directive.partition("=")
    return name, value


def _quoted(value: str) -> str:
    """As sbatch reads it: a blank ends a value, and # begins a comment, where no quotes are around it."""
    quotes = '"' if " " in value or "#" in value else ""
    return f"={quotes}{value}{quotes}" if value else ""


def _header(options: JobOptions, stage: str, folder: Path) -> dict[str, str]:
    hardware = options.config.hardware
    header = {"nodes": str(options.nodes[stage]), "signal": f"B:USR1@{options.lead_s}", "chdir": str(folder)}
    header["output"] = str(options.run_dir / "logs" / f"{stage}-{'%A_%a' if options.seeds else '%j'}.log")
    if hardware.platform == "cuda":
        header["gpus-per-node"] = str(hardware.gpus_per_node)
    if options.seeds:
        header["array"] = f"0-{len(options.seeds) - 1}"
    if stage in options.times:
        header["time"] = options.times[stage]
    return {**header, **options.flags}


def _settings(options: JobOptions, stage: str, home: Path) -> dict[str, str]:
    hardware = options.config.hardware
    store_gb, serves = hardware.object_store_gb, options.retriever and needs_retriever(options.config, stage)
    return {
        "DGPO_HOME": str(home),
        "DGPO_RUN_DIR": str(options.run_dir),
        "DGPO_SEEDS": " ".join(map(str, options.seeds)),
        "DGPO_ACTIVATE": options.activate,
        "DGPO_CONTAINER": options.container,
        "DGPO_RETRIEVER": options.retriever if serves else "",
        "DGPO_RETRIEVER_ACTIVATE": options.retriever_activate if serves else "",
        "DGPO_RETRIEVER_NODES": str(options.retriever_nodes) if serves else "",
        "DGPO_GPUS": str(hardware.gpus_per_node),
        "DGPO_CPUS": str(hardware.logical_cpus or ""),
        "DGPO_OBJECT_STORE_BYTES": str(int(store_gb * 1e9)) if store_gb else "",
        "DGPO_NODE_TMP": str(options.node_tmp),
        "DGPO_LEAD_S": str(options.lead_s),
        "DGPO_RETRIES": str(options.retries),
    }


def _arguments(options: JobOptions, stage: str) -> list[str]:
    """The stage's overrides, as bash's `$@`, one a line."""
    own = [override for override in options.overrides if not override.startswith("run_dir=")]
    if options.nodes[stage] < options.config.hardware.num_nodes:
        own = [*own, f"hardware.num_nodes={options.nodes[stage]}"]
    if stage == "test":
        own = [*own, *tested_model(options)]
    return [" \\\n  ".join(["set --", *map(shlex.quote, own)])] if own else []
