"""Test results to TensorBoard and Weights & Biases, under the release's metric names; one run per model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from dgpo.config.schema import Config

Metrics = Mapping[str, float]


def log_metrics(config: Config, models: Mapping[str, Metrics], folder: Path) -> None:
    """Sends each model's metrics to the services in `test.loggers`; TensorBoard's files go to `tensorboard/<model>`.

    Args:
        models: name in the table -> its metrics.
        folder: of the stage.
    """
    for name, metrics in models.items():
        for logger in config.test.loggers:
            if logger in LOGGERS:
                LOGGERS[logger](config, name, metrics, folder)


def _tensorboard(config: Config, name: str, metrics: Metrics, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / name)) as writer:
        for metric, value in metrics.items():
            writer.add_scalar(metric, value)


def _wandb(config: Config, name: str, metrics: Metrics, folder: Path) -> None:
    import wandb

    try:
        run = wandb.init(
            project="dgpo",
            group=Path(config.run_dir).name,
            name=f"{Path(config.run_dir).name}-test-{name}",
            job_type="test",
            dir=folder,
            config={**asdict(config), "model": config.test.models[name]},
        )
        run.log(dict(metrics))
        run.finish()
    except wandb.Error as error:  # the results are on the disk: a service that refuses them is no failed evaluation
        print(
            f"wandb did not take the metrics of {name} ({error}): run `wandb login`, or set WANDB_MODE=offline, and "
            "repeat the command with resume=true",
            file=sys.stderr,
        )


LOGGERS: dict[str, Callable[[Config, str, Metrics, Path], None]] = {"tensorboard": _tensorboard, "wandb": _wandb}
