"""A machine like the README's: a checkout of its own, a hub, a `node0`, and no other network.

The network is a name space of Linux (`unshare`), in which the hub is the only server and `node0` is this machine, so
that nothing can come from elsewhere and no port is taken. `pixi` and `sbatch` are stand-ins that do what the real ones
are told: run a task of pixi.toml, and run a job where it is submitted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKOUT = ("configs", "dgpo", "examples", "pixi.toml", "requirements", "retriever", "scripts")
HUB_PORT = 8088
ADDRESS = "10.0.0.1"  # of node0
START_S = 300
LINE_S = 1800

PIXI = f"""#!/bin/bash
exec {sys.executable} -m tests.e2e.pixi "$@"
"""
# A job runs where it is submitted, after those that it depends on, which have ended by then; without RUN_JOBS bash only
# reads it.
SBATCH = """#!/bin/bash
script=${*: -1}
count=$(($(cat "$JOBS/count" 2>/dev/null || echo 0) + 1))
echo "$count" >"$JOBS/count"
export SLURM_JOB_ID=$((7000000 + $$ * 10 + count)) SLURM_JOB_NODELIST=node0 SLURM_CPUS_ON_NODE=2
flags=-n
[ -z "$RUN_JOBS" ] || flags=
bash $flags "$script" >"$JOBS/$count.log" 2>&1 || { cat "$JOBS/$count.log" >&2; exit 1; }
echo "$SLURM_JOB_ID"
"""
SLURM = {
    "sbatch": SBATCH,
    "scontrol": '#!/bin/bash\n[[ "$*" == "show hostnames"* ]] && echo node0 || echo "NodeName=node0 NodeAddr=node0"\n',
    "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    "squeue": "#!/bin/bash\n",
    "scancel": "#!/bin/bash\n",
}


@dataclass
class Ran:
    """One printed line, and what came of it."""

    line: str
    seconds: float
    rc: int
    output: str


@dataclass
class ClusterOfOne:
    """Use as a context manager; `log` grows with every line.

    Args:
        folder: where the checkout is made, and all that the lines write.
        hub: what the hub serves (tests/e2e/local_hub.py).
        overrides: of the file that DGPO_OVERRIDES names.
        runs_jobs: whether what is submitted runs; else bash reads it only.
    """

    folder: Path
    hub: Path
    overrides: list[str]
    runs_jobs: bool = True
    log: list[Ran] = field(default_factory=list)

    def __enter__(self) -> ClusterOfOne:
        self.checkout, bin_folder = self.folder / "checkout", self.folder / "bin"
        self.checkout.mkdir(parents=True)
        bin_folder.mkdir()
        for name in CHECKOUT:
            (self.checkout / name).symlink_to(ROOT / name)
        (self.checkout / "logs_of_jobs").mkdir()
        for name, text in {"pixi": PIXI, **SLURM}.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self.site = self.folder / "site.txt"
        self.write_overrides(self.overrides)
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{ADDRESS} node0\n")
        python = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "SLURM_"))},
            "PATH": f"{bin_folder}:{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
            "HF_HOME": str(self.folder / "hf"),
            "DGPO_OVERRIDES": str(self.site),
            "RUN_JOBS": "1" if self.runs_jobs else "",
            "JOBS": str(self.checkout / "logs_of_jobs"),
        }
        inside = (
            f"ip link set lo up && ip address add {ADDRESS} dev lo && mount --bind {hosts} /etc/hosts && "
            f"exec {sys.executable} -m tests.unit.hub_server {self.hub} {HUB_PORT}"
        )
        self.processes = [
            subprocess.Popen(
                ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c", inside],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        ]
        assert self.processes[0].stdout is not None
        assert self.processes[0].stdout.readline() == "ready\n", "the hub did not start"
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes[1:]):
            os.killpg(process.pid, signal.SIGTERM)
        self.processes[0].terminate()
        for process in self.processes:
            process.wait(timeout=30)

    def write_overrides(self, overrides: list[str]) -> None:
        """What DGPO_OVERRIDES says from now on."""
        self.site.write_text("\n".join(["# sizes of the test", *overrides, ""]))

    def command(self, line: str) -> list[str]:
        """`bash -c LINE`, in the checkout, inside the name space."""
        enter = ["nsenter", f"--target={self.processes[0].pid}", "--user", "--preserve-credentials", "--net", "--mount"]
        return [*enter, "env", f"--chdir={self.checkout}", "bash", "-c", line]

    def run(self, line: str) -> Ran:
        """Runs the line as printed, to its end."""
        started = time.monotonic()
        process = subprocess.Popen(
            self.command(line),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return self._ran(line, started, process.returncode, output)

    def serve(self, line: str, ready: str) -> Ran:
        """Starts the line as printed, and waits until `ready`, a line too, ends well."""
        started, path = time.monotonic(), self.folder / f"server{len(self.processes)}.log"
        with path.open("w") as file:
            process = subprocess.Popen(
                self.command(line), env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        while subprocess.run(self.command(ready), env=self.environment, capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() - started > START_S:
                return self._ran(line, started, process.poll() or -1, path.read_text())
            time.sleep(0.3)
        return self._ran(line, started, 0, path.read_text())

    def _ran(self, line: str, started: float, rc: int, output: str) -> Ran:
        ran = Ran(line, time.monotonic() - started, rc, output)
        self.log.append(ran)
        return ran


def can_have_a_network_of_its_own() -> bool:
    """Whether this user may make name spaces here."""
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
