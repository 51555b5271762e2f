"""Serve an index from several machines: replicas, and shards of an index that one machine cannot hold, on Ray.

python -m retriever.deploy --replicas 4 --urls-file retriever.urls --index wiki=/data/wiki --device cuda
python -m retriever.deploy --replicas 2 --shards 4 --index wiki=/data/wiki-shards/{shard} --device cuda

Run it on any node of a Ray cluster (`ray start --head` on one, `ray start --address=HEAD:6379` on the others); without
one it starts Ray on this machine. Every node must see the index under the same path. Arguments that are not listed
below go to retriever.serve; {shard} in them becomes the number of the shard. The URLs, separated by commas as
`retriever.url` of dgpo takes them, are written to --urls-file once all replicas are ready. A server that dies is
started again by Ray, on another node if its own is gone; clients use the other replicas meanwhile.

With SLURM and no shards, Ray is not needed:
srun --nodes 4 --ntasks-per-node 1 python -m retriever.serve --host 0.0.0.0 --index wiki=/data/wiki --device cuda
"""

import argparse
import ctypes
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from retriever.options import TOKEN_VARIABLE, ServeOptions, parse_options

POLL_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
RESTART_DELAY_S = 3.0  # between the death of a server and its next start
LOG_TAIL_CHARS = 2000


class ServerActor:
    """One server process on the node that Ray chose; it ends with its actor, and its actor with it."""

    def __init__(self, arguments: Sequence[str], port: int, token: str | None, log_folder: str) -> None:
        import ray

        self._ever_ready = ray.get_runtime_context().was_current_actor_reconstructed
        host = ray.util.get_node_ip_address()
        self._url = f"http://{f'[{host}]' if ipaddress.ip_address(host).version == 6 else host}:{port}"
        self._log = Path(log_folder) / f"retriever-{port}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({TOKEN_VARIABLE: token} if token else {})
        command = [sys.executable, "-m", "retriever.serve", *arguments, "--host", host, "--port", str(port)]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """End the actor with its server, so that Ray starts both again; a first start that fails is left to `state`."""
        self._process.wait()
        if self._ever_ready:
            time.sleep(RESTART_DELAY_S)
            os._exit(1)

    def state(self) -> tuple[str, bool, str | None]:
        """URL, whether it is ready, and why it never will be."""
        code = self._process.poll()
        if code is not None and not self._ever_ready:
            return self._url, False, f"exit status {code}: {self._log.read_text()[-LOG_TAIL_CHARS:]}"
        try:
            with urllib.request.urlopen(f"{self._url}/ready", timeout=5):
                self._ever_ready = ready = True
        except (OSError, urllib.error.URLError):
            ready = False
        return self._url, ready, None

    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    def stop(self) -> None:
        """Drain and end the server."""
        self._ever_ready = False
        self._process.terminate()
        self._process.wait()


@dataclass(frozen=True)
class Plan:
    """What is started where: per replica either one server, or a front server and one per shard."""

    serve_arguments: tuple[str, ...]
    options: ServeOptions
    num_replicas: int
    num_shards: int
    port: int
    log_folder: str

    def arguments(self, shard: int) -> list[str]:
        return [argument.replace("{shard}", str(shard)) for argument in self.serve_arguments]

    def shard_port(self, replica: int, shard: int) -> int:
        """Front servers have the first ports, so that clients see consecutive ones."""
        return self.port + self.num_replicas + replica * self.num_shards + shard


def missing_resources(plan: Plan, available: Mapping[str, float]) -> str | None:
    """What a cluster with these resources lacks for the plan, or None."""
    num_servers = plan.num_replicas * max(1, plan.num_shards)
    wanted = {"CPU": num_servers * plan.options.num_threads}
    if plan.options.device != "cpu":
        wanted["GPU"] = num_servers
    short = [f"{available.get(name, 0):.0f} of {number} {name}s" for name, number in wanted.items()]
    return " and ".join(short) if any(available.get(name, 0) < number for name, number in wanted.items()) else None


class Deployment:
    """The actors of a plan. A front server is started again when Ray moved one of its shards to another node."""

    def __init__(self, plan: Plan) -> None:
        import ray

        self._ray, self._plan = ray, plan
        self._shards = [
            [self._start(plan.arguments(shard), plan.shard_port(replica, shard)) for shard in range(plan.num_shards)]
            for replica in range(plan.num_replicas)
        ]
        self._shard_urls = [[self._state(actor)[0] for actor in actors] for actors in self._shards]
        self.fronts = [self._start_front(replica) for replica in range(plan.num_replicas)]

    def _start(self, arguments: Sequence[str], port: int, *, is_front: bool = False) -> Any:
        options = self._plan.options
        return (
            self._ray.remote(ServerActor)
            .options(
                num_cpus=0 if is_front else options.num_threads,  # a front server only waits for its shards
                num_gpus=0 if is_front or options.device == "cpu" else 1,
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            .remote(list(arguments), port, options.token, self._plan.log_folder)
        )

    def _start_front(self, replica: int) -> Any:
        plan = self._plan
        if not plan.num_shards:
            return self._start(plan.arguments(0), plan.port + replica)
        shards = [f"--shard={url}" for url in self._shard_urls[replica]]
        return self._start(shards, plan.port + replica, is_front=True)

    def _state(self, actor: Any) -> tuple[str, bool, str | None]:
        """Like `ServerActor.state`; an actor that Ray is starting again has no URL yet."""
        try:
            return self._ray.get(actor.state.remote(), timeout=30)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            return "", False, None

    def poll(self) -> tuple[list[str], bool]:
        """URLs of the replicas and whether all are ready; raises `ValueError` when a server cannot start."""
        for replica, actors in enumerate(self._shards):
            urls = [self._checked(actor)[0] for actor in actors]
            if all(urls) and urls != self._shard_urls[replica]:
                self._shard_urls[replica] = urls
                self._ray.kill(self.fronts[replica])
                self.fronts[replica] = self._start_front(replica)
        states = [self._checked(actor) for actor in self.fronts]
        return [url for url, _ in states if url], all(ready for _, ready in states)

    def _checked(self, actor: Any) -> tuple[str, bool]:
        url, ready, failure = self._state(actor)
        if failure:
            raise ValueError(f"the server at {url} ended with {failure}")
        return url, ready

    def stop(self) -> None:
        """Drain all servers, the front ones first."""
        for actors in (self.fronts, [actor for replica in self._shards for actor in replica]):
            stopping = [actor.stop.remote() for actor in actors]
            self._ray.wait(stopping, num_returns=len(stopping), timeout=self._plan.options.limits.drain_s + 5)


def parse_plan(arguments: Sequence[str] | None) -> tuple[Plan, argparse.Namespace]:
    """The plan of a command line; raises `ValueError` for what retriever.serve would refuse at once."""
    parser = argparse.ArgumentParser(
        prog="python -m retriever.deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=1, help="servers that share the load (default: %(default)s)")
    parser.add_argument(
        "--shards", type=int, default=0, help="of each replica, made by retriever.split (default: the index is whole)"
    )
    parser.add_argument("--urls-file", type=Path, help="write the replicas' URLs here, separated by commas")
    parser.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, a running one, or a new one here)")
    parser.add_argument(
        "--port",
        type=int,
        default=ServeOptions.port,
        help="of the first replica; the others follow (default: %(default)s)",
    )
    parser.add_argument("--token-file", type=Path, help="as for retriever.serve; read here and passed on")
    parser.add_argument(
        "--log-folder", default="/tmp/retriever-logs", help="on each node, a log per server (default: %(default)s)"
    )
    given, rest = parser.parse_known_args(arguments)
    if given.replicas < 1 or given.shards == 1 or given.shards < 0:
        raise ValueError(f"--replicas {given.replicas} --shards {given.shards}: expected 1 or more, and 0 or 2 or more")
    if taken := [argument for argument in rest if argument.split("=")[0] in ("--host", "--port-file", "--shard")]:
        raise ValueError(f"{taken[0]} is set by retriever.deploy; leave it out")
    if given.shards and not any("{shard}" in argument for argument in rest):
        raise ValueError("--shards needs {shard} in --index, as in --index wiki=/data/wiki-shards/{shard}")
    token = ["--token-file", str(given.token_file)] if given.token_file else []
    options = parse_options([*rest, *token], description="")
    plan = Plan(tuple(rest), options, given.replicas, given.shards, given.port, given.log_folder)
    return plan, given


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        plan, given = parse_plan(arguments)
        _deploy(plan, given.address, given.urls_file)
    except ValueError as error:
        sys.exit(f"retriever.deploy: {error}")


def _deploy(plan: Plan, address: str | None, urls_file: Path | None) -> None:
    import ray

    ray.init(address=address, log_to_driver=False)
    for stop_signal in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
        signal.signal(stop_signal, _interrupt)
    if lacking := missing_resources(plan, ray.cluster_resources()):
        print(
            f"retriever.deploy: the cluster has {lacking}; servers wait until nodes join, or take fewer --replicas, "
            "--shards or --num-threads",
            file=sys.stderr,
        )
    deployment = None
    announced: list[str] = []
    try:
        deployment = Deployment(plan)
        while True:
            urls, ready = deployment.poll()
            if ready and urls != announced:
                announced = urls
                if urls_file:
                    partial = urls_file.with_name(f"{urls_file.name}.{os.getpid()}")
                    partial.write_text(",".join(urls) + "\n")
                    partial.replace(urls_file)
                print(f"retriever.deploy: {len(urls)} replicas ready: {','.join(urls)}", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        if deployment:
            deployment.stop()
    finally:
        ray.shutdown()


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
