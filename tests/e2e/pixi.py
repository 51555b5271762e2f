"""A stand-in for `pixi run [-e ENVIRONMENT] TASK [ARGUMENT ...]`: the task of pixi.toml, in the environment at hand.

`pixi task list` prints the tasks. The manifest's `activation.env` is set, where the shell has not set the variable.

Installation is left out: `depends-on` names nothing else.
"""

from __future__ import annotations

import os
import shlex
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def command(words: Sequence[str], manifest: Path) -> list[str]:
    """What pixi would execute. Raises `SystemExit` for an environment or a task that is not there."""
    if words[0] != "run":
        sys.exit(f"pixi {words[0]}: only `run` is stood in for")
    environment, words = (words[2], words[3:]) if words[1] == "-e" else ("default", words[1:])
    pixi = tomllib.loads(manifest.read_text())
    if environment not in pixi["environments"]:
        sys.exit(f"pixi: no environment {environment!r}, expected one of {', '.join(pixi['environments'])}")
    tasks = dict(pixi["tasks"])
    for feature in pixi["environments"][environment]:
        tasks |= pixi["feature"][feature].get("tasks", {})
    if words[0] not in tasks:
        sys.exit(f"pixi: {environment} has no task {words[0]!r}, expected one of {', '.join(tasks)}")
    return [*shlex.split(tasks[words[0]]["cmd"]), *words[1:]]


if __name__ == "__main__":
    manifest = tomllib.loads(Path("pixi.toml").read_text())
    if sys.argv[1:] == ["task", "list"]:
        listed = [manifest["tasks"], *(feature.get("tasks", {}) for feature in manifest["feature"].values())]
        print("\n".join(f"{name}  {task['description']}" for tasks in listed for name, task in tasks.items()))
        sys.exit()
    found = command(sys.argv[1:], Path("pixi.toml"))
    os.environ |= manifest.get("activation", {}).get("env", {}) | os.environ
    os.execvp(found[0], found)
