"""What a stage's results depend on, recorded with them: compared before anything is continued or used again.

`train` and `distill` keep it as `settings.json` in their folder, episodes that are being played beside their partial
file, and every finished result in its manifest. Models, files and the retriever stand there by content
(`dgpo.runs.identity`), not by where they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgpo.agent.protocol import TEMPLATE_VARIABLES
from dgpo.config.schema import Config
from dgpo.errors import ConfigError
from dgpo.files import atomic_write_text
from dgpo.runs.artifacts import MANIFEST, package_versions, read_manifest

SETTINGS = "settings.json"
# The one list of what may differ between a run of `train` or `distill` and its continuation; anything else in the
# sections that such a stage reads may not. A name stands for all keys below it.
MAY_CHANGE = (
    # how far, how often it saves and validates, what it keeps and shows
    "train.num_steps",
    "train.save_every",
    "train.keep_last",
    "train.keep_best",
    "train.keep_steps",
    "train.validate_every",
    "train.log_episodes_every",
    "train.num_logged_episodes",
    "train.loggers",
    "train.timeline",
    "train.teacher_term.num_monitored",
    # what it does about trouble
    "train.stability",
    "train.limits",
    "train.max_restarts",
    "distill.patience",
    # how the machine does it
    "train.generation_concurrency",
    "train.chunk_tokens",
    "distill.micro_batch_size",
    "distill.chunk_tokens",
    # where things are; what is there is compared by content
    "train.init",
    "distill.init",
    "distill.episodes",
)
MAX_SHOWN = 6  # differences in a message
_DIGEST = re.compile(r"[0-9a-f]{40,64}")


def fixed_settings(config: Config, *sections: str) -> dict[str, Any]:
    """The settings below some keys that must stay as they are while a run is continued, by dotted key.

    Args:
        sections: keys such as `train` or `hardware.dtype`; the seed is always among the settings.
    """
    values = flat(asdict(config))
    return {
        key: value for key, value in values.items() if _below(key, ("seed", *sections)) and not _below(key, MAY_CHANGE)
    }


def episode_settings(
    config: Config, *, weights: str, retriever: Any, temperature: float, stop: Sequence[str]
) -> dict[str, Any]:
    """Everything that decides an episode but its question.

    Args:
        weights, retriever: identities of the model that plays and of what it searches (`dgpo.runs.identity`).
        stop: strings that end a turn.
    """
    return {
        "weights": weights,
        "temperature": temperature,
        "stop": list(stop),
        "retriever": retriever,
        "template": TEMPLATE_VARIABLES,
        **fixed_settings(config, "episode", "hardware.engine.dtype"),
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in one line; empty where nothing does.

    A setting of this version that an older one did not know had its default then.
    """
    plain_before, plain_now = (flat(json.loads(json.dumps(each, default=str))) for each in (before, now))
    plain_before = {**_defaults(plain_now), **plain_before}
    keys = [key for key in sorted({*plain_before, *plain_now}) if plain_before.get(key) != plain_now.get(key)]
    shown = [f"{key} was {_shown(plain_before, key)}, now {_shown(plain_now, key)}" for key in keys[:MAX_SHOWN]]
    more = [f"and {len(keys) - MAX_SHOWN} more"] if len(keys) > MAX_SHOWN else []
    return "; ".join([*shown, *more])


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], *, made: str | Path) -> None:
    """Raises `ConfigError` with what differs, where the settings are not those under which `made` was made."""
    difference = differences(before, now)
    if difference:
        raise ConfigError(
            f"{made} was made with other settings ({difference}): go back to them, delete it, or choose another run_dir"
        )


def record_or_check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what the stage in `folder` depends on, or compares it with what stands there.

    A folder of a version that recorded nothing goes on, with a note.

    Raises:
        ConfigError: they differ; names what and how.
    """
    path = folder / SETTINGS
    before = read_settings(path)
    if before is not None:
        check_same(before, settings, made=folder)
        return
    if any(folder.iterdir()):
        print(
            f"{folder}: what it was begun with was not recorded, and is not compared; from now on it is",
            file=sys.stderr,
            flush=True,
        )
    write_settings(path, settings)


def record_or_check_command(path: Path, overrides: Sequence[str], **facts: str) -> None:
    """Writes what a command over many stages was given, or compares it with what stands there.

    Args:
        path: of the record, in the command's run folder.
        facts: what else may not change in that folder.

    Raises:
        ConfigError: they differ; names what and how.
    """
    now = {**facts, "overrides": sorted(overrides)}
    if not path.exists():
        atomic_write_text(path, json.dumps({**now, "versions": package_versions()}, indent=1) + "\n")
        return
    before, given = (
        {**{name: each.get(name) for name in facts}, **dict(text.partition("=")[::2] for text in each["overrides"])}
        for each in (json.loads(path.read_text()), now)
    )
    check_same(before, given, made=path.parent)


def is_finished(folder: Path, *, stage: str, settings: Mapping[str, Any]) -> bool:
    """Whether the stage has finished in the folder, from the same inputs and under the same settings; says so.

    Raises:
        ConfigError: it has, under others.
        DataError: the folder is another stage's, or a file in it has changed.
    """
    if not (folder / MANIFEST).exists():
        return False
    before = read_manifest(folder, stage=stage).get("settings")
    note = "; what it was made from was not recorded, and is not compared" if before is None else ""
    check_same(settings if before is None else before, settings, made=folder)
    print(f"{stage}: {folder} is finished already{note}; to repeat it, delete the folder", file=sys.stderr)
    return True


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _defaults(now: Mapping[str, Any]) -> dict[str, Any]:
    known = flat({**json.loads(json.dumps(asdict(Config()))), "template": TEMPLATE_VARIABLES})
    return {key: known[key] for key in now if key in known}


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not recorded"
    value = settings[key]
    return f"{value[:12]}.." if isinstance(value, str) and _DIGEST.fullmatch(value) else json.dumps(value)
