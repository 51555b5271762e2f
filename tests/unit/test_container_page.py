"""Every command of docs/containers.md, taken apart: options that exist, and inner commands that the project has."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dgpo.__main__ import COMMANDS
from dgpo.config.load import load_config
from dgpo.slurm.options import parse_options
from dgpo.slurm.render import render

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "containers.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.strip().splitlines()]
# Options, and whether a value follows, by the manuals of Docker and Apptainer.
DOCKER = {"--rm": 0, "--gpus": 1, "--init": 0, "--ulimit": 1, "--volume": 1, "--workdir": 1}
DOCKER |= {"--ipc=host": 0, "--shm-size=64g": 0, "--network=host": 0}
APPTAINER = {"--nv": 0, "--bind": 1, "--pwd": 1, "--env": 1}


def split(words: list[str], options: dict[str, int]) -> tuple[list[str], str, list[str]]:
    """(options, image, inner command)."""
    place = 0
    while words[place].startswith("-"):
        place += 1 + options[words[place]]
    return words[:place], words[place], words[place + 1 :]


def check_inner(words: list[str]) -> None:
    if words[:2] == ["bash", "-c"]:
        enter, words = (shlex.split(part) for part in words[2].split("&&"))
        assert enter == ["source", ".venv-gpu/bin/activate"]
    if words[0] == "dgpo":
        assert words[1] in COMMANDS
        load_config(words[2:])
    elif words[:2] != ["python", "-m"]:
        assert words[0] in ("bash", "python")
        assert (ROOT / words[1]).is_file()
    else:
        assert words[2:] == ["venv", ".venv-gpu"]


def container_lines(*first: str) -> list[list[str]]:
    return [words[len(first) :] for line in LINES if (words := shlex.split(line))[: len(first)] == list(first)]


def test_every_line_is_of_a_kind_that_is_checked_here():
    assert len(LINES) == len(
        [line for line in LINES if line.startswith(("docker run", "apptainer exec", "python -m dgpo"))]
    )


@pytest.mark.parametrize("words", container_lines("docker", "run"), ids=" ".join)
def test_docker_lines_have_shared_memory_and_run_what_there_is(words):
    options, image, inner = split(words, DOCKER)
    assert image == "IMAGE"
    assert {"--ipc=host", "--shm-size=64g"} & set(options)
    check_inner(inner)


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker client, without its daemon")
@pytest.mark.parametrize("words", container_lines("docker", "run"), ids=" ".join)
def test_docker_itself_knows_the_options(words):
    options, _, _ = split(words, DOCKER)
    result = subprocess.run(["docker", "run", *options, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", container_lines("apptainer", "exec"), ids=" ".join)
def test_apptainer_lines_bring_the_driver_in_and_run_what_there_is(words):
    options, image, inner = split(words, APPTAINER)
    assert "--nv" in options
    assert image.endswith(".sif")
    check_inner(inner)


def test_the_launcher_puts_the_container_before_the_commands_of_a_job():
    (words,) = container_lines("python", "-m", "dgpo.slurm")
    options = parse_options(words)
    words = shlex.split(options.container)
    assert split(words[2:], APPTAINER)[2] == []
    for stage in options.stages:
        assert f"export DGPO_CONTAINER='{options.container}'" in render(options, stage)
