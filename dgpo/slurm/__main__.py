"""Submits the stages of a run to SLURM, each after the one before it (docs/slurm.md).

python -m dgpo.slurm --partition gpu --account lab --activate 'source /shared/dgpo/.venv/bin/activate' \
    --retriever '--index wiki=/shared/indexes/wiki18 --num-threads 32' \
    pair=qwen3b_05b hardware=h200x8xN hardware.num_nodes=2 run_dir=runs/dgpo data.train_file=data/train.parquet ...
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dgpo.checks import check_settings
from dgpo.errors import ConfigError, DgpoError, exit_code
from dgpo.files import atomic_write_text
from dgpo.slurm.inputs import missing_inputs
from dgpo.slurm.options import JobOptions, config_of, parse_options
from dgpo.slurm.render import render, submission


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (`dgpo.errors`): 0 done, 1 SLURM refused, 2 the command is wrong."""
    return exit_code("dgpo.slurm", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    options = parse_options(arguments)
    for stage in options.stages:
        check_settings(config_of(options, stage), [stage])
    missing = missing_inputs(options)
    if options.dry_run:
        print(describe(options))
    if missing:
        raise ConfigError("missing: " + "; ".join(missing))
    if not options.dry_run:
        submit(options)


def describe(options: JobOptions) -> str:
    """What would be submitted: per stage the command and the script."""
    parts, after = [], None
    for stage in options.stages:
        command = submission(_script(options, stage), after, array=bool(options.seeds))
        parts.append(f"$ {' '.join(command)}\n\n{render(options, stage)}")
        after = f"<job of {stage}>"
    return "\n".join(parts)


def submit(options: JobOptions) -> dict[str, str]:
    """Writes the scripts into `run_dir/slurm` and submits them in order.

    Returns:
        Job numbers by stage.

    Raises:
        DgpoError: sbatch is not there or refuses.
    """
    jobs: dict[str, str] = {}
    for seed in options.seeds or (None,):
        folder = options.run_dir if seed is None else options.run_dir / f"seed{seed}"
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    (options.run_dir / "logs").mkdir(exist_ok=True)  # sbatch does not make the folder of its own log
    for stage in options.stages:
        script = _script(options, stage)
        atomic_write_text(script, render(options, stage))
        after = next(reversed(jobs.values()), None)
        jobs[stage] = _sbatch(submission(script, after, array=bool(options.seeds)), jobs)
        print(f"{stage}: job {jobs[stage]}{f', after {after}' if after else ''}", flush=True)
    print(f"logs: {options.run_dir / 'logs'}; to stop: scancel {' '.join(jobs.values())}")
    return jobs


def _script(options: JobOptions, stage: str) -> Path:
    return options.run_dir / "slurm" / f"{stage}.sbatch"


def _sbatch(command: Sequence[str], earlier: dict[str, str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = result.stderr.strip() if result.returncode else None
    except FileNotFoundError:
        failure = "sbatch was not found: submit from a node of the cluster, or print the scripts with --dry-run"
    if failure:
        if earlier:
            subprocess.run(["scancel", *earlier.values()], check=False)
        raise DgpoError(f"{shlex.join(command)}: {failure}")
    return result.stdout.strip().partition(";")[0]  # "job;cluster" where there are several


if __name__ == "__main__":
    sys.exit(main())
