"""Every file, module, key and command that a page, a docstring or a comment names exists."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from dgpo.__main__ import COMMANDS
from dgpo.config.load import FREE_MAPPINGS, SHORT, config_keys

ROOT = Path(__file__).parents[2]
OTHERS = (
    "from-search-r1.md"  # names Search-R1's own files and flags too; tests/unit/test_docs_keys.py reads its columns
)
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != OTHERS),
    *ROOT.glob("C*.md"),
]
SOURCES = [p for room in ("dgpo", "retriever", "scripts", "examples") for p in sorted((ROOT / room).rglob("*.py"))]
FILE = re.compile(
    r"(?<![\w./-])(?:dgpo|retriever|scripts|tests|configs|docs|examples)/[\w./-]+\.(?:py|md|yaml|sh|sbatch|svg|lock|js)\b"
)
MODULE = re.compile(r"(?<![\w./])dgpo(?:\.[a-z_]\w*)+|(?<=python -m )retriever(?:\.[a-z_]\w*)+")
KEY = re.compile(r"(?<![\w./{}*-])([a-z_]+(?:\.[a-z_]\w*)+)(?==)")
COMMAND = re.compile(r"(?:python -m dgpo|(?<![\w./-])dgpo) ([a-z]+)\b(?= |$)", re.MULTILINE)
TASK = re.compile(r"pixi run (?:-e [\w-]+ )?([a-z][a-z-]*)\b")


@cache
def keys() -> tuple[str, ...]:
    return (*config_keys(), *SHORT)


def known_key(key: str) -> bool:
    return key.startswith(FREE_MAPPINGS) or any(each == key or each.startswith(f"{key}.") for each in keys())


def known_module(name: str) -> bool:
    """A module, or a name in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.is_dir() and end == len(parts):
            return True
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if file.is_file():
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", file.read_text()) is not None
    return False


def prose(path: Path) -> str:
    """A page as it is; of a source its docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
    return "\n".join([*docstrings, *re.findall(r"#(.*)$", text, re.MULTILINE)])


def code(text: str) -> str:
    """What stands in backticks or in a block of code."""
    return "\n".join(block or inline for block, inline in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL))


def unknown_names(text: str) -> list[str]:
    sections = {key.partition(".")[0] for key in keys()}
    pixi = tomllib.loads((ROOT / "pixi.toml").read_text())
    tasks = {name for table in (pixi, *pixi.get("feature", {}).values()) for name in table.get("tasks", {})}
    quoted = code(text)
    return sorted(
        {name for name in FILE.findall(text) if not (ROOT / name).exists()}
        | {name for name in MODULE.findall(text) if not known_module(name)}
        | {key for key in KEY.findall(quoted) if key.partition(".")[0] in sections and not known_key(key)}
        | {f"dgpo {name}" for name in COMMAND.findall(quoted) if name not in COMMANDS}
        | {f"pixi run {name}" for name in TASK.findall(quoted) if name not in tasks}
    )


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(path):
    assert unknown_names(prose(path)) == []


def test_names_that_do_not_exist_are_seen():
    text = "`docs/nowhere.md`, `dgpo.agent.episode.run_episode`, `dgpo.agent.episode.no_such_name`; "
    text += "`train.algorithmm=ppo`, `train.algorithm=ppo`, `hardware.env.X=1`, `python -m dgpo fly`, `pixi run fly`"
    assert unknown_names(text) == [
        "dgpo fly",
        "dgpo.agent.episode.no_such_name",
        "docs/nowhere.md",
        "pixi run fly",
        "train.algorithmm",
    ]
