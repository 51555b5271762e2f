"""How the authors' release starts `train` and `test`: arguments without `=`, and its variables.

dgpo train {data} {student} {teacher} {exp}        dgpo test {data} {model} {exp}
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dgpo.errors import ConfigError

DATA = "nq_hotpotqa_train"  # the release's name of its data, and the default
# Command -> its arguments in order, with the release's defaults.
ARGUMENTS = {
    "train": {
        "data": DATA,
        "student": "omron-sinicx/Qwen2.5-0.5B-Instruct-kd",
        "teacher": "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct",
        "exp": "dgpo-qwen2.5-0.5b",
    },
    "test": {"data": DATA, "model": "omron-sinicx/DGPO-qwen2.5-0.5b", "exp": "dgpo-test"},
}


def with_positions(command: str, arguments: Sequence[str]) -> list[str]:
    """Hydra overrides: of `train` and `test` the arguments without `=` as what they stand for; the others, last, win.

    A bare command, with `DATA_ROOT` set, is the release's: all of its defaults.

    Raises:
        ConfigError: too many, or one after an override.
    """
    expected = ARGUMENTS.get(command)
    if expected is None:
        return list(arguments)
    num_first = next((i for i, argument in enumerate(arguments) if "=" in argument), len(arguments))
    given, overrides = list(arguments[:num_first]), list(arguments[num_first:])
    late = [argument for argument in overrides if "=" not in argument]
    if late or len(given) > len(expected):
        order = " ".join(f"{{{name}}}" for name in expected)
        raise ConfigError(f"{' '.join(late or given)}: expected {order}, as far as given, before the first key=value")
    if not given and (overrides or "DATA_ROOT" not in os.environ):
        return overrides
    values = dict(zip(expected, [*given, *list(expected.values())[len(given) :]], strict=True))
    return [*_overrides(command, values), *overrides]


def _data_folder(command: str, name: str) -> Path:
    """Where the data lies: below `DATA_ROOT`; the default's also where our own `download` and `prepare` write it."""
    root = Path(os.environ.get("DATA_ROOT", "data"))
    ours = root / ("train" if command == "train" else "prepared")
    return ours if name == DATA and not (root / name).is_dir() and ours.is_dir() else root / name


def _overrides(command: str, values: dict[str, str]) -> list[str]:
    data = _data_folder(command, values["data"])
    run_dir = Path(os.environ.get("EXP_ROOT", "runs"), values["exp"])
    if command == "test":
        name = re.sub(r"\W", "_", Path(values["model"]).name)  # a dot would nest keys
        all_sets = data / "test.parquet"  # the release's; `prepare` writes a file for each set
        is_prepared = not all_sets.is_file() and (data / "nq_test.parquet").is_file()
        files = ["data=prepared", f"prepare.out={data}"] if is_prepared else [f"data.test_files.all={all_sets}"]
        return [f"test.models.{name}={values['model']}", *files, f"run_dir={run_dir}"]
    return [
        "stages=[train]",
        f"data.train_file={data}/train.parquet",
        f"student.path={values['student']}",
        f"train.init={values['student']}",
        f"teacher.path={values['teacher']}",
        f"run_dir={run_dir}",
    ]
