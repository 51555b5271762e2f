"""Overrides as they are typed: the guilty one is named, and a value that is text need not know Hydra's grammar."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dgpo.config.schema import Config
from dgpo.errors import ConfigError

KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
NAME = re.compile(r"[\w-]+", re.ASCII)
NESTED = ("hardware.verl", "retriever.backend_options")  # their keys may have dots: mappings within mappings
MAY_BE_EMPTY = ("hardware.env", *NESTED)
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list, such as [a,b]",
}


def readable(overrides: Sequence[str], choices: dict[str, list[str]], shown: dict[str, str]) -> list[str]:
    """The overrides as Hydra reads them: text that its grammar would not take, or take for a number, is quoted.

    Args:
        choices: of each group of settings.
        shown: key -> how the user may have written it, for messages.

    Raises:
        ConfigError: no `key=value`, an unknown key or choice, or a value of the wrong type; names the override.
    """
    return [_readable(override, choices, shown) for override in overrides]


def _readable(override: str, choices: dict[str, list[str]], shown: dict[str, str]) -> str:
    key, equals, value = override.partition("=")
    mapping = _mapping_of(key)
    if equals and mapping and mapping not in NESTED and not NAME.fullmatch(key.removeprefix(f"{mapping}.")):
        raise ConfigError(
            f"{override}: the name {key.removeprefix(f'{mapping}.')!r} cannot be read, use letters a to z, digits, _ "
            "and - in it"
        )
    if not equals or not KEY.fullmatch(key):
        raise ConfigError(f"{override!r} is no setting: expected key=value, such as train.num_steps=20")
    if key in choices:
        if value not in choices[key]:
            raise ConfigError(f"unknown choice {override!r}: {key} is one of {', '.join(choices[key])}")
        return override
    kind = _kind_of(key)
    if kind is None:
        raise ConfigError(f"unknown config key {key!r}: {_hint(key, choices)}")
    name = shown.get(key, key)
    if isinstance(kind, str):  # words about a section or a mapping
        raise ConfigError(f"{name}={value}: {kind}")
    if not value and mapping not in MAY_BE_EMPTY:
        raise ConfigError(f"{name}= has nothing behind it: expected {_expected(kind)}, or leave it out")
    parsed = _parse(override)
    if str in _kinds(kind) and "${" not in value and (parsed is None or not isinstance(parsed.value(), str | None)):
        return _prefixed(f"{key}={_quoted(value)}", key)
    if parsed is None:
        raise ConfigError(f"{name}={value} cannot be read, expected {_expected(kind)}{_way_out(name, kind, value)}")
    _check_type(name, key, kind, parsed.value(), value)
    return _prefixed(override, key)


def _way_out(name: str, kind: Any, value: str) -> str:
    """How a value that Hydra's grammar refuses has to be written, where that is for the quotes to say."""
    if any(typing.get_origin(each) is list for each in _kinds(kind)):
        return (
            ": quote texts with other than letters, digits and /.:_- in it, all of it once more for the shell, such as "
            f"'{name}=[\"/data (1)/a=b\"]'"
        )
    return "; ${ begins a reference to another setting, ${seed}" if "${" in value else ""


def _parse(override: str) -> Override | None:
    """None where Hydra's grammar has no such override."""
    try:
        parsed = _parser().parse_override(override)
        return None if parsed.is_sweep_override() else parsed
    except HydraException:
        return None


def _check_type(name: str, key: str, kind: Any, value: Any, text: str) -> None:
    if kind is Any or (isinstance(value, str) and "${" in value):
        return
    try:
        OmegaConf.update(_scratch(), key, value)
    except OmegaConfBaseException:
        raise ConfigError(f"{name}={text}: expected {_expected(kind)}") from None


def _prefixed(override: str, key: str) -> str:
    """Hydra wants `++` before a key that no file names; in a mapping of the user's, every key is such a one."""
    return f"++{override}" if _mapping_of(key) else override


def _quoted(text: str) -> str:
    """As a text in Hydra's grammar; a backslash is special only before a quote, or at the end."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _kind_of(key: str) -> Any:
    """The type of a leaf; a message for what is no leaf; None for an unknown key."""
    if mapping := _mapping_of(key):
        return _leaves()[mapping]
    kind = _leaves().get(key)
    if typing.get_origin(kind) is dict:
        return f"it has names of your own: expected {key}.NAME=value"
    if kind is None and (inside := [each for each in _leaves() if each.startswith(f"{key}.")]):
        return f"it is a section of settings: set one of it, such as {inside[0]}"
    return kind


def free_mappings() -> tuple[str, ...]:
    """What the keys begin with whose names are the user's: `test.models.`, .."""
    return tuple(f"{key}." for key, kind in _leaves().items() if typing.get_origin(kind) is dict)


def _mapping_of(key: str) -> str | None:
    """The mapping with names of the user's that the key is in."""
    return next((each[:-1] for each in free_mappings() if key.startswith(each)), None)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a leaf's type; of a mapping, its values'."""
    if typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _expected(kind: Any) -> str:
    words = [WORDS.get(typing.get_origin(each) or each, "a value") for each in _kinds(kind) if each is not type(None)]
    return " or ".join([*words, *(["null"] if type(None) in _kinds(kind) else [])])


@cache
def _scratch() -> DictConfig:
    """Values are tried in it. Made once, for it takes longer than to compose a configuration."""
    return OmegaConf.structured(Config)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


@cache
def _leaves() -> dict[str, Any]:
    """Key -> type of every leaf of the schema."""

    def walk(section: type, prefix: str) -> None:
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            key, kind = f"{prefix}{field.name}", hints[field.name]
            if dataclasses.is_dataclass(kind):
                walk(typing.cast(type, kind), f"{key}.")
            else:
                found[key] = kind

    found: dict[str, Any] = {}
    walk(Config, "")
    return found


def _hint(key: str, choices: dict[str, list[str]]) -> str:
    known = [*_leaves(), *choices]
    named_so = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    near = named_so if len(named_so) == 1 else difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else "`python -m dgpo train --help` lists the keys."
