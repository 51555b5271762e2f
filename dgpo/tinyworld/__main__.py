"""The two steps that make a tiny world: `python -m dgpo.tinyworld build|teacher --out FOLDER --seed N`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dgpo.config.ranges import RANGES
from dgpo.errors import ConfigError, Parser, exit_code

MAX_TEST = 6000  # half of them about held-out countries, of which no seed gives fewer than 4,809 questions


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (`dgpo.errors`)."""
    return exit_code("dgpo.tinyworld", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m dgpo.tinyworld", description=__doc__)
    parser.add_argument("step", choices=("build", "teacher"), help="write the world, or train its teacher")
    parser.add_argument("--out", type=Path, required=True, help="the world's folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-test", type=int, help=f"build: test questions, at most {MAX_TEST}")
    parser.add_argument(
        "--biased",
        choices=("capital", "currency", "language", "code"),
        help="teacher: a second one, models/teacher_biased, that answers 4 in 5 questions of this relation wrongly",
    )
    options = parser.parse_args(arguments)
    if options.seed not in RANGES["seed"]:
        raise ConfigError(f"--seed {options.seed}: expected {RANGES['seed']}")
    if options.num_test is not None and not 1 <= options.num_test <= MAX_TEST:
        raise ConfigError(f"--num-test {options.num_test}: expected a number from 1 to {MAX_TEST}")
    if options.step == "build":
        from dgpo.tinyworld.build import WorldSettings, build_world

        settings = WorldSettings(seed=options.seed)
        if options.num_test is not None:
            settings = replace(settings, num_test=options.num_test)
        for name, count in build_world(options.out, settings).items():
            print(f"{name}: {count}")
        return
    from dgpo.config.load import load_config
    from dgpo.engines.environment import export_environment

    hardware = load_config(["world=tiny", "hardware=cpu"]).hardware
    export_environment(hardware)
    from dgpo.tinyworld.oracle import Bias
    from dgpo.tinyworld.teacher import train_teacher

    bias = None
    if options.biased:
        bias = Bias(options.biased, quoted="language" if options.biased == "capital" else "capital")
    output = options.out / "models" / ("teacher_biased" if bias else "teacher")
    train_teacher(options.out, output, seed=options.seed, hardware=hardware, bias=bias)


if __name__ == "__main__":
    sys.exit(main())
