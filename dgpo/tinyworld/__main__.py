"""The two steps that make a tiny world: `python -m dgpo.tinyworld build|teacher --out FOLDER --seed N`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dgpo.errors import exit_code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dgpo.tinyworld", description=__doc__)
    parser.add_argument("step", choices=("build", "teacher"), help="write the world, or train its teacher")
    parser.add_argument("--out", type=Path, required=True, help="the world's folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--biased",
        choices=("capital", "currency", "language", "code"),
        help="teacher: a second one, models/teacher_biased, that answers 4 in 5 questions of this relation wrongly",
    )
    options = parser.parse_args()
    if options.step == "build":
        from dgpo.tinyworld.build import WorldSettings, build_world

        for name, count in build_world(options.out, WorldSettings(seed=options.seed)).items():
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
    sys.exit(exit_code("dgpo.tinyworld", main))
