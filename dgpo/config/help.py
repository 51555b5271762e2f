"""What `--help` says of the configuration. One source: defaults and comments of `dgpo/config/schema.py`."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from dgpo.config import schema
from dgpo.config.load import GROUPS, group_choices, spelt
from dgpo.config.schema import Config

WIDTH = 118
STAGE = ("run_dir", "stages", "seed", "resume", "dry_run", "student", "hardware")
PLAY = ("episode", "retriever")
# command -> the keys and sections that it reads, as tests/unit/test_dry_runs.py sees them read; one that is not here
# reads all of them
SECTIONS: dict[str, tuple[str, ...]] = {
    "download": ("download", "student.path", "teacher.path", "teacher.init"),
    "prepare": ("seed", "prepare"),
    "contamination": ("run_dir", "data", "contamination"),
    "collect": (*STAGE, "teacher", "data.collect_file", *PLAY, "collect"),
    "distill": (*STAGE, "teacher", *PLAY, "distill"),
    "train": (*STAGE, "teacher", "data.train_file", "data.validation_file", *PLAY, "train"),
    "test": (*STAGE, "data.test_files", *PLAY, "test"),
    "arcap": (*STAGE, "data.test_files", *PLAY, "test"),
    "ask": ("run_dir", "student", "hardware", *PLAY, "ask"),
    "report": ("run_dir", "dry_run", "report"),
    "export": ("run_dir", "export"),
    "import": (),
    "compare": (),
    "doctor": ("hardware", "download.endpoint"),
}


def describe(command: str) -> str:
    """The groups with their choices, then every key that the command reads: meaning and default."""
    sections = SECTIONS.get(command)
    if sections == ():
        return ""
    groups = "\n".join(f"  {group}={'|'.join(group_choices(group))}" for group in GROUPS)
    defaults = OmegaConf.structured(Config)
    lines = []
    for key, meaning in meanings(Config):
        if sections is None or any(f"{key}.".startswith(f"{read}.") for read in sections):
            lines.append(f"  {key}={_shown(OmegaConf.select(defaults, key))}")
            lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    title = "\ngroups of settings (configs/<group>/<choice>.yaml)\n"
    return title + groups + "\n\nkeys, their defaults and meanings\n" + "\n".join(lines)


def meanings(section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, meaning) of every leaf below a section, in the order of the schema."""
    types = get_type_hints(section)
    for each in fields(section):
        if is_dataclass(types[each.name]):
            yield from meanings(types[each.name], f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, _comments(section).get(each.name, "")


@cache
def _comments(section: type) -> dict[str, str]:
    """Field -> its comment, beside it or on the lines above it; those of the classes below it included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if base.__module__ == schema.__name__:
            found |= dict(_commented_fields(inspect.getsource(base)))
    return found


def _commented_fields(source: str) -> Iterator[tuple[str, str]]:
    above: list[str] = []
    line: list[tokenize.TokenInfo] = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not line:
            above.append(_words(token))
        elif token.type in (tokenize.NEWLINE, tokenize.NL) and depth == 0:
            code = [each for each in line if each.type != tokenize.COMMENT]
            if len(code) > 1 and code[1].string == ":" and code[0].type == tokenize.NAME:
                beside = [_words(each) for each in line if each.type == tokenize.COMMENT]
                yield code[0].string, " ".join([*above, *beside])
            if line:
                above, line = [], []
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL):
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.string, 0)
            line.append(token)


def _words(comment: tokenize.TokenInfo) -> str:
    return re.sub(r"\bNone\b", "null", comment.string.lstrip("# "))


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(str, value))}]"
    return spelt(value)
