"""A real SLURM on one machine: a controller and two nodes, each in network, mount, process and host name spaces of its
own, joined by a bridge that leads nowhere else. Needs root; installs Debian's packages where they are missing.

python -m tests.slurm.cluster COMMAND...     starts it, runs the command beside the controller, ends it
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
NODES = ("n1", "n2")
ADDRESSES = {"ctl": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
PREFIX = "dgpo-"  # of the network name spaces

CONFIGURATION = """
ClusterName=test
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=30
CredType=cred/munge
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdLogFile={base}/slurmd.%n.log
SlurmdSpoolDir={base}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
MinJobAge=7200
SlurmdTimeout=20
NodeName=n1 NodeAddr={n1} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeAddr={n2} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""

# Runs as the first process of a node: its host name, its own /dev/shm and local folder, and the names of the others.
ENTER = """
hostname {name}
mount --bind {base}/hosts /etc/hosts
mount --bind {base}/local.{name} {base}/local
mount -t tmpfs tmpfs /dev/shm
exec env SLURM_CONF={base}/slurm.conf "$@"
"""


class Slurm:
    """A running cluster.

    Attributes:
        local: a folder that each node has of its own, under one path.
    """

    def __init__(self, base: Path) -> None:
        self.base, self.local = base, base / "local"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Runs a command beside the controller; returns what it printed."""
        result = subprocess.run(
            self._within("ctl", command), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ..."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, number: str, *states: str, timeout_s: float) -> dict[str, str]:
        """The job, once it is in one of the states; in another that is final, it fails at once."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "NODE_FAIL", "REQUEUED"), job
            assert time.monotonic() < deadline, f"not {states} within {timeout_s} s: {job}"
            time.sleep(0.5)
        return job

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """As if it lost power: every process of it is killed."""
        self._processes[name].kill()
        self._processes.pop(name).wait()

    def start_node(self, name: str) -> None:
        (self.base / f"local.{name}").mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    def start(self) -> None:
        """The munge daemon, the network, the controller and the nodes; returns when the nodes are idle."""
        self.local.mkdir()
        (self.base / "local.ctl").mkdir()
        (self.base / "state").mkdir()
        (self.base / "slurm.conf").write_text(CONFIGURATION.format(base=self.base, **ADDRESSES))
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # none is used
        hosts = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.base / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        self._start_munge()
        _make_network()
        self._start("ctl", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        deadline = time.monotonic() + 60
        while "idle" not in (seen := self._node_states()):
            assert time.monotonic() < deadline, f"the nodes are {seen}; logs in {self.base}"
            time.sleep(0.5)

    def stop(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)  # of the name space's first process, which takes all others with it
            process.wait()
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", f"{PREFIX}{name}"], check=False, capture_output=True)

    def _node_states(self) -> str:
        with contextlib.suppress(AssertionError):  # the controller does not answer yet
            states = self.run("sinfo", "--noheader", "--format=%D %T").splitlines()
            return states[0].removeprefix("2 ") if len(states) == 1 else "/".join(states)
        return ""

    def _start_munge(self) -> None:
        folder = self.base / "munge"
        folder.mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        options = [f"--key-file={folder}/key", f"--socket={folder}/socket", f"--log-file={folder}/log"]
        options += [f"--pid-file={folder}/pid", f"--seed-file={folder}/seed", "--foreground"]
        self._processes["munge"] = subprocess.Popen(
            ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", *options]
        )

    def _start(self, name: str, *command: str) -> None:
        with (self.base / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._within(name, command, new_processes=True), stdout=log, stderr=log, start_new_session=True
            )

    def _within(self, name: str, command: Sequence[str], *, new_processes: bool = False) -> list[str]:
        script = ENTER.format(name=name, base=self.base)
        kinds = ["--uts", "--mount", *(["--pid", "--fork", "--mount-proc", "--kill-child"] if new_processes else [])]
        enter = ["ip", "netns", "exec", f"{PREFIX}{name}", "unshare", *kinds, "bash", "-euc", script, name]
        return [*enter, *command]


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Slurm]:
    """Starts a cluster and ends it with all that runs there."""
    base = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: Ray's sockets lie below it
    base.chmod(0o755)
    cluster = Slurm(base)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(base)


def why_not() -> str | None:
    """Why no cluster can be started here, or None. Installs what is missing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for name spaces"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} not found, and no apt-get to install {' '.join(PACKAGES)}"
    return _install() if missing else None


def _install() -> str | None:
    """Debian's packages from the configured sources, without starting their services."""
    policy = Path("/usr/sbin/policy-rc.d")
    was_there = policy.exists()
    if not was_there:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
        result = subprocess.run(
            command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, check=False
        )
    finally:
        if not was_there:
            policy.unlink()
    return None if result.returncode == 0 else f"{' '.join(command)} failed: {result.stderr[-500:]}"


def _make_network() -> None:
    """A bridge in the controller's name space, a pair of virtual interfaces for each node; no way out."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for name in ADDRESSES:
        subprocess.run(
            ["ip", "netns", "delete", f"{PREFIX}{name}"], check=False, capture_output=True
        )  # of a killed run
        ip("netns", "add", f"{PREFIX}{name}")
        ip("-n", f"{PREFIX}{name}", "link", "set", "lo", "up")
    inside = ["-n", f"{PREFIX}ctl"]
    ip(*inside, "link", "add", "bridge", "type", "bridge")
    ip(*inside, "address", "add", f"{ADDRESSES['ctl']}/24", "dev", "bridge")
    ip(*inside, "link", "set", "bridge", "up")
    for name in NODES:
        ip(*inside, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"{PREFIX}{name}")
        ip(*inside, "link", "set", f"to-{name}", "master", "bridge", "up")
        ip("-n", f"{PREFIX}{name}", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        ip("-n", f"{PREFIX}{name}", "link", "set", "eth0", "up")
        # Leads no further than the controller, but Ray and vLLM learn from it which address is theirs.
        ip("-n", f"{PREFIX}{name}", "route", "add", "default", "via", ADDRESSES["ctl"])


def main(command: Sequence[str]) -> None:
    reason = why_not()
    if reason:
        sys.exit(f"no SLURM here: {reason}")
    with slurm_cluster() as cluster:
        print(cluster.run(*command, timeout_s=3600))


if __name__ == "__main__":
    main(sys.argv[1:])
