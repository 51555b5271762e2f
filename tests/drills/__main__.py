"""Runs the fault drills and prints a table: fault, what happened, how long that took, what was lost.

bash scripts/drills.sh                            all, about half an hour on 2 cores
bash scripts/drills.sh --only training --out drills
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.drills import playing, training, two_nodes
from tests.drills.processes import DrillFailedError
from tests.drills.report import Outcome, table
from tests.drills.world import served_twice

GROUPS = {"training": training.drill, "nodes": two_nodes.drill, "playing": playing.drill}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every drill ended as it must."""
    parser = argparse.ArgumentParser(
        prog="scripts/drills.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/drills"), help="runs, logs, table.md (%(default)s)")
    parser.add_argument("--world", type=Path, help="a tiny world with its indexes; built below --out without it")
    parser.add_argument("--only", choices=GROUPS, action="append", help="this group of drills")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    outcomes: list[Outcome] = []
    with served_twice(out, given.world) as world:
        for name in given.only or GROUPS:
            try:
                for outcome in GROUPS[name](world, out / name):
                    outcomes.append(outcome)
                    print(f"{outcome.fault}: {outcome.what} ({outcome.seconds:.1f} s)", flush=True)
            except DrillFailedError as error:
                print(f"{name}: FAILED: {error}", file=sys.stderr)
                outcomes.append(Outcome(name, "FAILED", 0.0, str(error), "?"))
    text = table(outcomes)
    (out / "table.md").write_text(text)
    print(f"\n{text}")
    return int(any(outcome.what == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
