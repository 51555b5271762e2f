"""What we rely on in veRL and vLLM is there as it was read; see tests/contract.py."""

import ast
import json

import pytest

from tests import contract

EXPECTED = json.loads(contract.GOLDEN.read_text())


@pytest.mark.parametrize("package", contract.NAMES)
def test_names_that_we_use_are_as_they_were_read(package):
    version, pinned = contract.version(package), EXPECTED[package]["version"]
    if version != pinned:
        pytest.skip(f"{package} {version} is installed, the contract is of {pinned}: run tests/contract.py")
    actual = contract.read(package, contract.installed(package))
    assert contract.differences(package, EXPECTED[package]["names"], actual) == []


def test_every_use_names_a_file_of_ours():
    for package in contract.NAMES:
        for name, use in contract.uses(package).items():
            paths = [word for word in use.split() if word.startswith("dgpo/")]
            assert all((contract.GOLDEN.parents[2] / path).exists() for path in paths), (name, use)


def test_every_method_of_verls_trainer_that_the_loop_calls_is_listed():
    """By its name: what `DGPOTrainer` calls of itself and does not define."""
    tree = ast.parse((contract.GOLDEN.parents[2] / "dgpo" / "rl" / "loop.py").read_text())
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in ("self", "super()")
    }
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    overridden = own & {name.split(".")[-1] for name in contract.uses("verl")}
    listed = {name.split(".")[-1] for name in contract.uses("verl")}
    assert overridden >= {"fit", "step"}
    assert (called - own) - listed == set()


def test_each_change_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "NAMES", {"verl": {"a.py": {"called by us": "kept changed signed gone"}}})
    source = "def kept(x):\n    {kept}\n    return x\n"
    source += "def changed(x):\n    return {changed}\ndef signed({signed}):\n    pass\n"
    (tmp_path / "a.py").write_text(
        source.format(kept='"""A docstring."""', changed="x", signed="x") + "def gone(): ..."
    )
    before = contract.read("verl", tmp_path)
    (tmp_path / "a.py").write_text(source.format(kept="# a comment", changed="-x", signed="x, y"))
    assert contract.differences("verl", before, before) == []
    assert contract.differences("verl", before, contract.read("verl", tmp_path)) == [
        "verl/a.py: changed (called by us): its source changed",
        "verl/a.py: signed (called by us): signature (x, y), was (x)",
        "verl/a.py: gone (called by us) is gone",
    ]


def test_an_imported_name_is_unchanged_where_others_come_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "NAMES", {"verl": {"a.py": {"patched by us": "kept"}}})
    (tmp_path / "a.py").write_text("from verl.b import kept")
    before = contract.read("verl", tmp_path)
    (tmp_path / "a.py").write_text("from verl.b import another, kept")
    assert contract.differences("verl", before, contract.read("verl", tmp_path)) == []
