"""Every number of the configuration has a range: its ends are accepted, what lies beyond is refused by name."""

import dataclasses
import math
import typing

import pytest

from dgpo.config.load import load_config
from dgpo.config.ranges import RANGES, Range, number_problems
from dgpo.config.schema import Config
from dgpo.errors import ConfigError


def leaves(cls=Config, prefix=""):
    """(key, type) of each leaf of the schema."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


NUMBERS = {key: kind for key, kind in leaves(Config) if "int" in str(kind) or "float" in str(kind)}


def with_number(key, number):
    """A default configuration with this number under the key, as an element where the key has a list."""
    config = Config()
    *path, name = key.split(".")
    owner = config
    for each in path:
        owner = getattr(owner, each)
    setattr(owner, name, [number] * 2 if "list" in str(NUMBERS[key]) else number)
    return config


def test_every_number_has_a_range_and_no_range_is_of_nothing():
    assert set(RANGES) == set(NUMBERS)


def test_the_defaults_lie_within():
    assert list(number_problems(Config())) == []


@pytest.mark.parametrize("key", RANGES)
def test_the_ends_are_accepted_and_what_lies_beyond_is_refused(key):
    valid, whole = RANGES[key], "int" in str(NUMBERS[key])
    step = 1 if whole else 1e-6
    inside = [valid.low + step * valid.without_low]
    outside = [valid.low - step * (not valid.without_low)]
    if valid.high < math.inf:
        inside.append(valid.high - step * valid.without_high)
        outside.append(valid.high + step * (not valid.without_high))
    for number in inside:
        assert list(number_problems(with_number(key, number))) == []
    for number in [*outside, *([] if whole else [math.nan, math.inf, -math.inf])]:
        (problem, *_) = number_problems(with_number(key, number))
        assert problem.startswith(f"{key}=")
        assert str(valid) in problem


def test_a_range_says_what_was_expected():
    shown = [str(Range(1)), str(Range(0, without_low=True)), str(Range(0, 1)), str(Range(0, 1, without_low=True))]
    assert shown == ["at least 1", "more than 0", "a number from 0 to 1", "more than 0 and at most 1"]
    assert str(Range(0, 2**32 - 1)) == "a number from 0 to 4294967295"


@pytest.mark.parametrize(
    "override",
    ["train.actor_learning_rate=nan", "train.gamma=2", "ask.port=65536", "seed=-1", "train.adam_betas=[0.9,1]"],
)
def test_a_composed_configuration_has_been_looked_at_whatever_the_command(override):
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}=.*: expected "):
        load_config([override])
