"""Composes `configs/` and the command line's Hydra overrides into one typed `Config`."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dgpo.config.schema import Config
from dgpo.errors import ConfigError

GROUPS = ("world", "hardware", "recipe", "data", "pair", "experiment")
# The user names the keys of these.
FREE_MAPPINGS = (
    "data.test_files.",
    "test.models.",
    "test.modes.",
    "hardware.env.",
    "hardware.verl.",
    "retriever.backend_options.",
)
NUM_NODES = "SLURM_NNODES"  # read by configs/hardware/h200x8xN.yaml
READ_BY_CONFIGS = (NUM_NODES, "DATA_ROOT")
OVERRIDES_FILE = "DGPO_OVERRIDES"  # names a file of overrides, one a line, of every command that starts from that shell
SHORT = {"dry_run": "dry_run.enabled", "collect.from": "collect.source"}  # no field can be called `from`
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


OmegaConf.register_new_resolver("cores", lambda ranks: max(1, len(os.sched_getaffinity(0)) // ranks), replace=True)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Composes `configs/config.yaml` with Hydra overrides such as `world=tiny train.num_steps=20`.

    The lines of the file that `DGPO_OVERRIDES` names come before them, so that what is given here wins.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, or unknown group choice; no such file.
    """
    return _composed([*_from_file(), *_plan_for(overrides)])


def _composed(overrides: Sequence[str]) -> Config:
    return copy.deepcopy(_compose(tuple(overrides), tuple(map(os.environ.get, READ_BY_CONFIGS))))


def _from_file() -> list[str]:
    """The overrides of the user's file, in the long spelling; blank lines and those that begin with # are none."""
    path = os.environ.get(OVERRIDES_FILE)
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"{OVERRIDES_FILE}={path} cannot be read ({error.strerror}): correct or unset it") from None
    return _spelt([line for line in lines if line and not line.startswith("#")])


@lru_cache(maxsize=256)  # half a second each, and a plan of the paper's tables asks for the same ones again and again
def _compose(overrides: tuple[str, ...], environment: tuple[str | None, ...]) -> Config:
    """The configuration of these overrides; `environment`, what the files read of it, is part of the key alone."""
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name="config", overrides=[_may_add(override) for override in overrides])
        # Plain values merged once more into the schema: `+key=value` gets past Hydra's own check.
        plain = OmegaConf.to_container(composed, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error


def config_keys(node: DictConfig | None = None, prefix: str = "") -> list[str]:
    """All dotted keys of the schema, leaves only."""
    node = OmegaConf.structured(Config) if node is None else node
    keys: list[str] = []
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and len(child):
            keys += config_keys(child, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def group_choices(group: str) -> list[str]:
    """The presets of one group (`world`, `pair`, ..); empty for a name that is no group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")) if group in GROUPS else []


def chosen(group: str, overrides: Sequence[str]) -> str | None:
    """The choice that the overrides make for a group; None where they leave it to `configs/config.yaml`."""
    choices = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    return choices[-1] if choices else None


def changed_settings(config: Config) -> list[str]:
    """`key=value` of each leaf that differs from what no override at all gives."""
    default = dict(_leaves(asdict(_composed(()))))
    return [f"{key}={value}" for key, value in _leaves(asdict(config)) if default.get(key, MISSING) != value]


def recipe_settings(config: Config, section: str) -> list[str]:
    """Each setting of a section on which paper and schema differ: `key=value`, whose it is, and the other."""
    paper = dict(_leaves(yaml.safe_load((CONFIG_DIR / "recipe" / "paper.yaml").read_text())))
    recommended, own = dict(_leaves(asdict(Config()))), dict(_leaves(asdict(config)))
    lines = []
    for key in (key for key in paper if key.startswith(f"{section}.")):
        if own[key] == paper[key]:
            whose = f"the paper's; recommended: {recommended[key]}"
        elif own[key] == recommended[key]:
            whose = f"recommended; the paper's: {paper[key]}"
        else:
            whose = f"the paper's: {paper[key]}; recommended: {recommended[key]}"
        lines.append(f"{key}={own[key]} ({whose})")
    return lines


def _leaves(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, as written into every run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _plan_for(overrides: Sequence[str]) -> list[str]:
    """The long spelling, and the hardware group that `dry_run.assume` names."""
    spelt = _spelt(overrides)
    assumed, hardware = chosen("dry_run.assume", spelt), chosen("hardware", spelt)
    if assumed is None or assumed == "null":
        return spelt
    if assumed not in group_choices("hardware"):
        raise ConfigError(f"dry_run.assume={assumed}: expected one of {', '.join(group_choices('hardware'))}")
    if hardware not in (None, assumed):
        raise ConfigError(f"dry_run.assume={assumed} with hardware={hardware}: the plan is for one of them")
    return [*spelt, f"hardware={assumed}"]


def _spelt(overrides: Sequence[str]) -> list[str]:
    """`dry_run=true` and its like as the key that they stand for."""
    return [next((o.replace(a, key, 1) for a, key in SHORT.items() if o.startswith(f"{a}=")), o) for o in overrides]


def _may_add(override: str) -> str:
    """Hydra wants `++` before a key that no file names; in a free mapping every key is such a one."""
    return f"++{override}" if override.startswith(FREE_MAPPINGS) else override


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line from Hydra's chain of exceptions, with the nearest valid key where a key is unknown."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and cause is not None:
        text = f"{text} {' '.join(str(cause).split())}"
    if NUM_NODES in text:
        return "hardware.num_nodes is not set: add hardware.num_nodes=N (inside a SLURM job it is the job's)"
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        choices = group_choices(key)
        if choices and value not in choices:
            return f"unknown choice {override!r}: {key} is one of {', '.join(choices)}"
        if key and key.rsplit(".", 1)[-1] in text and key not in (*config_keys(), *GROUPS):
            near = difflib.get_close_matches(key, [*config_keys(), *GROUPS], n=1)
            hint = f"did you mean {near[0]}?" if near else "`python -m dgpo train --help` lists the keys."
            return f"unknown config key {key!r}: {hint}"
    return f"bad configuration: {text}"
