"""Composes `configs/` and the command line's Hydra overrides into one typed `Config`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dgpo.config.overrides import free_mappings, readable
from dgpo.config.ranges import number_problems
from dgpo.config.schema import Config
from dgpo.errors import ConfigError, first_line, one_line

GROUPS = ("world", "hardware", "recipe", "data", "pair", "experiment")
FREE_MAPPINGS = free_mappings()
NUM_NODES = "SLURM_NNODES"  # read by configs/hardware/h200x8xN.yaml
READ_BY_CONFIGS = (NUM_NODES, "DATA_ROOT")
OVERRIDES_FILE = "DGPO_OVERRIDES"  # names a file of overrides, one a line, of every command that starts from that shell
SHORT = {"dry_run": "dry_run.enabled", "collect.from": "collect.source"}  # no field can be called `from`
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("cores", lambda ranks: max(1, len(os.sched_getaffinity(0)) // ranks), replace=True)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Composes `configs/config.yaml` with Hydra overrides such as `world=tiny train.num_steps=20`.

    The lines of the file that `DGPO_OVERRIDES` names come before them, so that what is given here wins.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, unknown group choice, or a number out of its
            range; no such file.
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
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:  # ValueError: no text
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{OVERRIDES_FILE}={path} cannot be read ({reason}): correct or unset it") from None
    return _spelt([line for line in lines if line and not line.startswith("#")])


@lru_cache(maxsize=256)  # half a second each, and a plan of the paper's tables asks for the same ones again and again
def _compose(overrides: tuple[str, ...], environment: tuple[str | None, ...]) -> Config:
    """The configuration of these overrides; `environment`, what the files read of it, is part of the key alone."""
    choices = {group: group_choices(group) for group in GROUPS}
    hydra_overrides = readable(overrides, choices, {key: short for short, key in SHORT.items()})
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name="config", overrides=hydra_overrides)
        # Plain values merged once more into the schema: `+key=value` gets past Hydra's own check.
        plain = OmegaConf.to_container(composed, resolve=True)
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    check_numbers(config)
    return config


def check_numbers(config: Config) -> None:
    """Raises `ConfigError` for the first number that is out of its range (`dgpo.config.ranges`)."""
    for problem in number_problems(config):
        raise ConfigError(problem)


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
    choices = [value for key, _, value in (each.lstrip("+").partition("=") for each in overrides) if key == group]
    return choices[-1] if choices else None


def changed_settings(config: Config | dict[str, Any]) -> list[str]:
    """`key=value` of each leaf that differs from what no override at all gives; of a recorded tree as well."""
    default = dict(leaves(asdict(_composed(()))))
    settings = asdict(config) if isinstance(config, Config) else config
    return [f"{key}={value}" for key, value in leaves(settings) if default.get(key, MISSING) != value]


def recipe_settings(config: Config, section: str) -> list[str]:
    """Each setting of a section on which paper and schema differ: `key=value`, whose it is, and the other."""
    paper = dict(leaves(yaml.safe_load((CONFIG_DIR / "recipe" / "paper.yaml").read_text())))
    recommended, own = dict(leaves(asdict(Config()))), dict(leaves(asdict(config)))
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


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below nested mappings; an empty mapping is a value."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def spelt(value: Any) -> str:
    """A plain value as an override spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, as written into every run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _plan_for(overrides: Sequence[str]) -> list[str]:
    """The long spelling, and the hardware group that `dry_run.assume` names."""
    spelt = _spelt(overrides)
    world, pair = chosen("world", spelt), chosen("pair", spelt)
    if world == "tiny" and pair is not None:
        raise ConfigError(
            f"pair={pair} with world=tiny (quickstart's): that world has models of its own; leave one out"
        )
    assumed, hardware = chosen("dry_run.assume", spelt), chosen("hardware", spelt)
    if assumed is None or assumed == "null":
        return spelt
    if assumed not in group_choices("hardware"):
        raise ConfigError(f"dry_run.assume={assumed}: expected one of {', '.join(group_choices('hardware'))}")
    if hardware not in (None, assumed):
        raise ConfigError(f"dry_run.assume={assumed} with hardware={hardware}: the plan is for one of them")
    return [*spelt, f"hardware={assumed}"]


def _spelt(overrides: Sequence[str]) -> list[str]:
    """`dry_run=true` and its like as the key that they stand for; without Hydra's + and ++, which say no more here."""
    plain = [override.lstrip("+") for override in overrides]
    return [next((o.replace(a, key, 1) for a, key in SHORT.items() if o.startswith(f"{a}=")), o) for o in plain]


def _explain(error: Exception) -> str:
    """One line of what Hydra finds wrong with overrides that are each readable by themselves."""
    text = one_line(f"{error} {error.__cause__ or ''}")
    if NUM_NODES in text:
        return "hardware.num_nodes is not set: add hardware.num_nodes=N (inside a SLURM job it is the job's)"
    if isinstance(error, OmegaConfBaseException) and error.full_key:  # whose text goes on with the types of its own
        return f"{error.full_key}: {first_line(error)}"
    return f"bad configuration: {text}"
