"""Every command that a page prints, without running it: options and overrides are read by the very code that would.

A line that no kind here claims fails. Ours are run or rehearsed as well (tests/e2e/test_readme.py).
"""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dgpo.__main__ import COMMANDS
from dgpo.config.load import GROUPS, SHORT, group_choices
from dgpo.config.release import with_positions
from dgpo.config.schema import Config
from dgpo.models.importing import OPTIONS
from dgpo.slurm.options import parse_options
from retriever import options as serving
from tests.e2e.pixi import command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("docker", "apptainer")  # tests/unit/test_container_page.py
PLACEHOLDERS = re.compile(r"(?<!\S)(\.\.\.|\[.*?\]|MODEL|FOLDER|QUESTIONS\.parquet)(?!\S)")
WRONG = (AssertionError, SystemExit, ValueError, OSError, OmegaConfBaseException)
OTHERS_OPTIONS = {  # of programs that are not ours, by their manuals
    "ray": {"start", "--head", "--port=6379"},
    "srun": {"--nodes", "4", "--ntasks-per-node", "1"},
    ".venv/bin/pre-commit": {"install"},
}


def lines(page: Path) -> list[str]:
    """The commands of a page's bash blocks, a continued one as one line."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    joined = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in joined if line and not line.startswith("#")]


def check_overrides(overrides: list[str]) -> None:
    """Groups have the choice, the schema the key, and the value its type; without Hydra, which takes half a second."""
    keys = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in GROUPS:
            assert value in group_choices(key), override
        else:
            keys.append(f"{SHORT.get(key, key)}={value}")
    OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist(keys))


def check_python(words: list[str]) -> None:
    """`python -m MODULE ...` or `python FILE ...`."""
    if words[0] != "-m":
        text = (ROOT / words[0]).read_text()
        assert [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in text] == []
        check_overrides([word for word in words[1:] if re.match(r"[a-z_.]+=", word)])
    elif words[1] == "dgpo":
        check_dgpo(words[2:])
    elif words[1] == "dgpo.slurm":
        assert parse_options([*words[2:], *([] if "--retriever" in words else ["retriever.url=http://node0"])]).stages
    elif words[1] == "retriever.serve":
        assert serving.parse_options(words[2:], description="").indexes
    elif words[1] in ("retriever.build", "retriever.convert"):
        check_parsed(words[1], words[2:])
    else:
        raise AssertionError(f"python -m {words[1]} is of no kind that is checked here")


def check_parsed(module: str, arguments: list[str]) -> None:
    """The command reads its options and comes to the point where it would begin."""
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.run", lambda name, _: begun.append(name))
        importlib.import_module(module).main(arguments)
    assert begun == [module.partition(".")[2]]


def check_dgpo(words: list[str]) -> None:
    name, *arguments = words
    assert name in COMMANDS
    positions = [word for word in arguments if "=" not in word]
    if name in ("train", "test"):
        check_overrides(with_positions(name, arguments))
        return
    assert len(positions) <= {"own": 1, "ask": 1, "compare": 2}.get(name, 0), positions
    overrides = [word for word in arguments if "=" in word]
    if name == "import":
        assert {word.partition("=")[0] for word in overrides} <= set(OPTIONS)
    else:
        check_overrides(overrides)


def check(words: list[str]) -> None:
    while re.match(r"[A-Z_]+=", words[0]):  # variables of one command
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "pixi":
        check(command(arguments, ROOT / "pixi.toml"))
    elif program == "dgpo":
        check_dgpo(arguments)
    elif program == "python":
        check_python(arguments)
    elif program == "bash":
        assert subprocess.run(["bash", "-n", arguments[0]], cwd=ROOT, check=False).returncode == 0
    elif program == "export":
        assert all(re.match(r"[A-Z_]+=\S", word) for word in arguments)
    elif program in OTHERS_OPTIONS:
        known = OTHERS_OPTIONS[program]
        rest = [word for word in arguments if word not in known]
        assert len(arguments) - len(rest) == len(known)
        if rest:
            check(rest)
    else:
        assert program in ELSEWHERE, f"{program} is of no kind that is checked here"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_read_by_what_would_run_it(page, monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "4")
    wrong = []
    for line in lines(page):
        words = shlex.split(PLACEHOLDERS.sub("", line.replace(" & ", " ")), comments=True)
        try:
            check(words)
        except WRONG as error:
            wrong.append(f"{line}\n    {error}")
    assert wrong == []


def test_commands_that_do_not_exist_are_seen():
    for line in ("dgpo fly", "dgpo train train.num_step=1", "pixi run fly", "pixi run -e moon train", "fly away"):
        with pytest.raises(WRONG):
            check(shlex.split(line))
    with pytest.raises(SystemExit):
        check(shlex.split("python -m retriever.convert --index a --out b --fly"))
