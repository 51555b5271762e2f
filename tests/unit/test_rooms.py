"""The rooms of `dgpo` and their order: a room imports from those above its line only, inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each line may import from the lines above it, and nothing else; rooms of one line do not know each other.
ORDER = """
__init__
errors files
algorithms metrics
config
agent
runs
data
models
hardware
checks
engines
platforms
coldstart
rl
evaluation
tinyworld slurm
pipeline
ask
__main__
"""
LEVELS = {room: level for level, line in enumerate(ORDER.strip().splitlines()) for room in line.split()}


def imports(source: str) -> set[str]:
    """Modules of dgpo or retriever that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            found |= {f"dgpo.{name}" for name in names} if node.module == "dgpo" else {node.module}
    return {name for name in found if name.split(".")[0] in ("dgpo", "retriever")}


def room_of(module: str) -> str:
    name = [*module.split("."), "__init__"][1]
    return "__init__" if name.startswith("__version") else name


def violations(source: str, room: str) -> list[str]:
    """Imports that go to the same line or below, or into the other package."""
    return sorted(
        name
        for name in imports(source)
        if name.startswith("retriever") or (room_of(name) != room and LEVELS[room_of(name)] >= LEVELS[room])
    )


@pytest.mark.parametrize("path", sorted((ROOT / "dgpo").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_from_above_only(path):
    room = path.relative_to(ROOT / "dgpo").parts[0].removesuffix(".py")
    assert room in LEVELS, f"{room} is a new room: give it its place in ORDER"
    assert violations(path.read_text(), room) == []


def test_the_retriever_knows_nothing_of_dgpo():
    for path in (ROOT / "retriever").glob("*.py"):
        assert not {name for name in imports(path.read_text()) if name.startswith("dgpo")}, path


def test_an_import_upward_is_seen_in_functions_and_under_type_checking_too():
    source = "def f():\n    from dgpo.rl.train import train\nif TYPE_CHECKING:\n    import dgpo.agent.search\n"
    assert violations(source, "agent") == ["dgpo.rl.train"]
    assert violations("from dgpo import rl", "data") == ["dgpo.rl"]
