"""The Ray that a run uses: the cluster that `RAY_ADDRESS` names, or a private one on this machine."""

from __future__ import annotations

import functools
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgpo.config.schema import HardwareConfig
from dgpo.engines.environment import DEFAULTS
from dgpo.errors import ConfigError

TOKEN = "ray_token"
CLAIM_TIMEOUT_S = 20.0
# For every process of ours in Ray. With the override on, Ray would hide the GPUs from actors that reserve none.
WORKER_ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TOKENIZERS_PARALLELISM": "false"}
# Where models and logs go, from the user's shell to nodes whose Ray was started elsewhere. No secrets: Ray logs them.
FORWARDED = ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "WANDB_MODE", "WANDB_DIR")
# SLURM may name the GPUs to every maker's library at once; veRL then refuses to start a worker.
OTHER_MAKERS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def in_cluster() -> bool:
    """Whether a cluster is named; its nodes, tokens and resources are then those of whoever started it."""
    return bool(os.environ.get("RAY_ADDRESS"))


def is_connected() -> bool:
    """Whether this process is in a Ray already."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def connect(
    hardware: HardwareConfig,
    *,
    token_folder: Path,
    object_store_gb: float | None = None,
    environment: Mapping[str, str] | None = None,
    log_to_driver: bool = True,
    listener: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Starts or joins Ray. Workers on every node get `hardware.env`, whatever environment Ray was started in there.

    Args:
        token_folder: holds the token of a private Ray, which listens on ports that every user of the machine can reach.
        object_store_gb: of a private Ray; None: `hardware.object_store_gb`.
        environment: more variables for the workers; `hardware.env` wins.
        log_to_driver: whether what workers print comes here.
        listener: gets that, a batch of lines at a time, in place of the terminal.

    Raises:
        ConfigError: several nodes, but no cluster is named.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if hardware.platform == "cuda":
        for name in OTHER_MAKERS:
            os.environ.pop(name, None)
    else:  # empty or NoDevFiles where GPUs are hidden or absent: Ray would count them, and ours are logical
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    shell = {name: os.environ[name] for name in (*DEFAULTS, *FORWARDED) if name in os.environ}
    variables = {**DEFAULTS, **WORKER_ENVIRONMENT, **shell, **(environment or {}), **hardware.env}
    runtime_env = {"env_vars": {name: str(value) for name, value in variables.items()}}
    if in_cluster():
        import ray

        ray.init(os.environ["RAY_ADDRESS"], runtime_env=runtime_env, log_to_driver=log_to_driver)
        _listen(listener)
        return
    if hardware.num_nodes > 1:
        raise ConfigError(
            f"hardware.num_nodes={hardware.num_nodes}, but RAY_ADDRESS is not set: start Ray on the nodes and set it "
            "to the head's address, or let `python -m dgpo.slurm` do both (docs/slurm.md)"
        )
    use_token(token_folder)
    store_gb = object_store_gb or hardware.object_store_gb
    import ray

    ray.init(
        "local",  # without an address, Ray would join whatever cluster runs here
        num_cpus=hardware.logical_cpus,
        num_gpus=hardware.logical_gpus,
        object_store_memory=int(store_gb * 1e9) if store_gb else None,
        include_dashboard=False,
        runtime_env=runtime_env,
        log_to_driver=log_to_driver,
    )
    _listen(listener)


def _listen(listener: Callable[[Mapping[str, Any]], None] | None) -> None:
    """Ray has no public way to take over its workers' output; the name is that of its own handler, which it removes."""
    if listener is None:
        return
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams

    streams.remove_handler("ray_print_logs")
    streams.add_handler("ray_print_logs", listener)


def claim() -> None:
    """Makes the cluster this process's own to train in, until it leaves.

    veRL's episode store has one name in a cluster: a second run would read and write the episodes of the first.

    Raises:
        ConfigError: another run has it.
    """
    import ray

    holder = ray.remote(num_cpus=0)(_Holder).options(name="training", namespace="dgpo")
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        try:
            _held[:] = [holder.remote()]
            return
        except ValueError as error:  # a run that has just ended still has it for a moment
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another run trains in the Ray cluster at {os.environ.get('RAY_ADDRESS')}, and its episode store "
                    "holds one run's: wait for its end, or start another cluster (without RAY_ADDRESS, a private one)"
                ) from error
            time.sleep(0.5)


class _Holder:
    """An actor that is only there: its name says that the cluster is taken, and dies with the driver."""


_held: list[Any] = []


def disconnect(token_folder: Path) -> None:
    """Leaves Ray, and ends a private one."""
    import ray

    ray.shutdown()
    forget_token(token_folder)


def forget_token(folder: Path) -> None:
    """Removes the token of a private Ray, if there is one, from the disk and from the environment."""
    token = folder / TOKEN
    if os.environ.get("RAY_AUTH_TOKEN_PATH") == str(token.resolve()):
        del os.environ["RAY_AUTH_TOKEN_PATH"]
    token.unlink(missing_ok=True)


@functools.cache
def _secret() -> str:
    """All private Rays that this process starts, one after the other, share it: Ray reads its token once."""
    return secrets.token_hex(32)


def use_token(folder: Path) -> None:
    """Makes the token of a private Ray, which reads where it is when it is imported: this or `connect` comes first."""
    if in_cluster():
        return
    token = folder / TOKEN
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(_secret())
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token.resolve()))
