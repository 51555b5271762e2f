"""scripts/install.sh and env.sh with a stand-in for Python: what would be installed, is refused, and is said."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Requirement files are pipes, so they are copied; installing flash-attn prints what pip shows of ninja.
PYTHON = """#!/bin/bash
arguments="$*"
case "$*" in
  *sys.prefix*) echo "$FOLDER/env" ;;
  -c*) exit "$LOADS" ;;
  *)
    echo "pip ${*/\\/dev\\/fd\\/*/-}" >>"$FOLDER/pip"
    env | grep -E '^(MAX_JOBS|FLASH|CUDA_HOME)' >>"$FOLDER/pip" || true
    while [ $# -gt 0 ]; do [ "$1" != -r ] || cat "$2" >>"$FOLDER/pip"; shift; done
    [[ "$arguments" != *"$FAILS"* ]] || exit 1
    echo "  [12/73] nvcc -c flash_fwd.cu" ;;
esac
"""
TOOLS = "bash awk sed cat cut sha256sum tail head tee touch rm nproc realpath dirname env grep".split()  # noqa: SIM905
NVCC = "#!/bin/bash\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"


class Machine:
    """A PATH with a stand-in for Python and for what else it has, an environment at `folder/env`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "env").mkdir()
        (folder / "bin").mkdir()
        for name in TOOLS:
            (folder / "bin" / name).symlink_to(shutil.which(name))
        self.has("python", PYTHON)

    def has(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(script)
        (self.folder / "bin" / name).chmod(0o755)

    def has_cuda(self) -> str:
        (self.folder / "cuda" / "bin").mkdir(parents=True)
        self.has("../cuda/bin/nvcc", NVCC)
        self.has("g++", "#!/bin/bash\n")
        return str(self.folder / "cuda")

    def install(self, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {"LOADS": "0", "FAILS": "nothing", **environment, "FOLDER": str(self.folder)}
        command = ["bash", str(ROOT / "scripts" / "install.sh"), kind]
        environment |= {"PATH": str(self.folder / "bin")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    @property
    def installed(self) -> str:
        path = self.folder / "pip"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_a_compiler_the_gpu_set_is_refused_before_anything_is_installed_with_the_ways_out(machine):
    result = machine.install("gpu", CUDA_HOME="/nowhere")
    assert result.returncode == 2
    assert "needs nvcc of CUDA 13 (seen: /nowhere)" in result.stderr
    assert "DGPO_FLASH_ATTN_WHEEL=" in result.stderr
    assert "DGPO_FLASH_ATTN=none" in result.stderr
    assert machine.installed == ""


def test_flash_attn_is_built_for_the_known_cards_alone_and_shows_its_progress(machine):
    result = machine.install("gpu", CUDA_HOME=machine.has_cuda())
    assert result.returncode == 0, result.stderr
    assert "flash-attn [12/73]" in result.stderr
    build = machine.installed.partition("FLASH_ATTN_CUDA_ARCHS")[2]
    assert build.startswith("=80;90\n")
    assert "flash-attn==" in build
    assert "flash-attn==" not in machine.installed.partition("FLASH_ATTN_CUDA_ARCHS")[0]


def test_a_wheel_is_installed_by_its_hash_and_nothing_is_compiled(machine, tmp_path):
    wheel = tmp_path / "flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    digest = hashlib.sha256(b"wheel").hexdigest()
    result = machine.install("gpu", DGPO_FLASH_ATTN_WHEEL=str(wheel), DGPO_FLASH_ATTN_SHA256=digest)
    assert result.returncode == 0, result.stderr
    assert f"flash-attn @ file://{wheel} --hash=sha256:{digest}\n" in machine.installed
    assert "flash-attn==" not in machine.installed


def test_pip_itself_takes_such_a_line_and_compares_the_hash(tmp_path):
    wheel = tmp_path / "flash_attn-2.8.3-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("flash_attn-2.8.3.dist-info/METADATA", metadata)
        archive.writestr("flash_attn-2.8.3.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("flash_attn-2.8.3.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for digits, passes in ((digest, True), ("0" * 64, False)):
        lines = tmp_path / "requirements.txt"
        lines.write_text(f"flash-attn @ file://{wheel} --hash=sha256:{digits}\n")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "--require-hashes"]
        result = subprocess.run([*command, "-r", str(lines)], capture_output=True, text=True, check=False)
        assert (result.returncode == 0) is passes, result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DGPO_FLASH_ATTN_WHEEL": "/no.whl", "DGPO_FLASH_ATTN_SHA256": "0" * 64}, "/no.whl: no such file, and no URL"),
        ({"DGPO_FLASH_ATTN_WHEEL": "https://host/flash.whl"}, "expected the 64 hex digits"),
        ({"DGPO_FLASH_ATTN": "wheel"}, "DGPO_FLASH_ATTN_WHEEL is not set"),
        ({"DGPO_FLASH_ATTN": "no"}, "expected build, wheel or none"),
    ],
)
def test_a_wrong_way_of_getting_flash_attn_is_refused(machine, settings, message):
    result = machine.install("gpu", **settings)
    assert result.returncode == 2
    assert message in result.stderr
    assert machine.installed == ""


def test_without_flash_attn_the_rest_of_the_lock_is_installed(machine):
    assert machine.install("gpu", DGPO_FLASH_ATTN="none").returncode == 0
    assert "\nvllm==" in machine.installed
    assert "flash-attn" not in machine.installed


def test_flash_attn_that_does_not_load_is_said(machine):
    result = machine.install("gpu", CUDA_HOME=machine.has_cuda(), LOADS="1")
    assert "flash-attn was installed but does not load" in result.stderr


@pytest.mark.parametrize(("version", "message"), [("570.86.10", "driver is 570.86.10; "), (None, "no NVIDIA driver")])
def test_a_driver_that_is_too_old_or_absent_is_said(machine, version, message):
    if version:
        machine.has("nvidia-smi", f"#!/bin/bash\necho {version}\necho {version}\n")
    result = machine.install("gpu", DGPO_FLASH_ATTN="none")
    assert result.returncode == 0
    assert message in result.stderr
    assert "580 or newer" in result.stderr


def test_a_new_driver_is_no_news(machine):
    machine.has("nvidia-smi", "#!/bin/bash\necho 580.65.06\n")
    assert "580 or newer" not in machine.install("gpu", DGPO_FLASH_ATTN="none").stderr


@pytest.mark.parametrize(("first", "second"), [("gpu", "cpu"), ("cpu", "gpu"), ("retriever-gpu", "gpu")])
def test_an_environment_never_holds_two_sets(machine, first, second):
    assert machine.install(first, DGPO_FLASH_ATTN="none").returncode == 0
    installed = machine.installed
    result = machine.install(second, DGPO_FLASH_ATTN="none")
    assert result.returncode == 2
    assert f"holds the {first} set, and the {second} set would break it" in result.stderr
    assert machine.installed == installed


def test_a_set_that_is_there_is_not_installed_again(machine):
    machine.install("cpu")
    installed = machine.installed
    assert machine.install("cpu").returncode == 0
    assert machine.installed == installed


def test_an_earlier_version_of_the_same_set_is_replaced(machine, tmp_path):
    (tmp_path / "env" / "dgpo-installed-cpu-0123456789abcdef").touch()
    assert machine.install("cpu").returncode == 0
    assert len(list((tmp_path / "env").glob("dgpo-installed-*"))) == 1


def test_a_failure_in_the_middle_is_a_failure(machine, tmp_path):
    result = machine.install("retriever", FAILS="--require-hashes")
    assert result.returncode == 1
    assert "-e ." not in machine.installed
    assert not list((tmp_path / "env").glob("dgpo-installed-*"))


def test_quickstart_and_check_keep_away_from_an_environment_of_another_kind(tmp_path):
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"#!/bin/bash\necho {folder}\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / "dgpo-installed-gpu-0123456789abcdef").touch()
    environment = {**os.environ, "DGPO_VENV": str(folder)}
    command = ["bash", str(ROOT / "scripts" / "check.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "holds the gpu set" in result.stderr
