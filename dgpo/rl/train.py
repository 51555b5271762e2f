"""Phase 2, from the command line: checks, veRL's configuration, Ray, and the final checkpoint as a Hugging Face folder.

python -m dgpo train experiment=dgpo pair=qwen3b_05b retriever.url=http://node0:8000 run_dir=runs/dgpo
python -m dgpo train world=tiny hardware=cpu dry_run=true ...
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgpo.checks import check_train
from dgpo.config.load import to_yaml
from dgpo.config.methods import has_teacher
from dgpo.config.schema import Config, HardwareConfig
from dgpo.config.stages import initial_model, with_absolute_paths
from dgpo.data.rows import read_rows, trained_row, write_rows
from dgpo.engines import ray_cluster
from dgpo.engines.environment import export_environment
from dgpo.errors import CollapseError, FaultError, RunStoppedError
from dgpo.hardware.dry_run import print_dry_run
from dgpo.rl.exports import export_models
from dgpo.rl.terminal import LOG, divert
from dgpo.runs.artifacts import MANIFEST, prepare_run_folder, read_manifest
from dgpo.runs.checkpoints import checkpoint_steps, newest_whole, read_seal, set_aside_later
from dgpo.runs.faults import forget_failure, translated_ray_errors, write_failure
from dgpo.runs.identity import file_identity, model_identity, retriever_identity
from dgpo.runs.owner import owned
from dgpo.runs.processes import end_processes, mark, mark_processes
from dgpo.runs.remains import remove_remains
from dgpo.runs.replacing import check_target
from dgpo.runs.rollback import CHECKPOINT, EVENTS, after_rollbacks, roll_back
from dgpo.runs.settings import fixed_settings, record_or_check
from dgpo.runs.stopping import stop_file_on_signal

# What veRL's workers expect of Ray's start (`verl.trainer.constants_ppo`, which takes seconds to import). A variable of
# the shell wins.
VERL_ENVIRONMENT = {
    name: os.environ.get(name, value)
    for name, value in {
        "NCCL_DEBUG": "WARN",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
        "TRANSFER_QUEUE_ENABLE": "1",
    }.items()
}
EXIT_GRACE_S = 20.0  # between the end of a run's driver and the killing of its processes


def train(config: Config) -> Path | None:
    """Runs the RL stage.

    Returns:
        The folder of the final Hugging Face checkpoint, or None for a dry run.

    Raises:
        ConfigError: from the checks, before Ray starts; `resume=true` under other settings; or another command works
            in the folder.
        RunStoppedError: the run stopped; it can be resumed from its last checkpoint.
        StoppedOnRequestError: on a signal (`dgpo.runs.stopping`); the step in progress was finished and saved.
    """
    notes = check_train(config)
    if config.dry_run:
        print_dry_run(config, "train", _plan(config), notes)
        return None
    folder = Path(config.run_dir) / "train"
    with owned(folder):
        return _train(config, folder)


def train_settings(config: Config) -> dict[str, Any]:
    """What a run of RL depends on. Changes of `MAY_CHANGE` apart, it is continued under no others."""
    questions = config.data.train_file or ""
    return {
        **fixed_settings(config, "episode", "train", "hardware.dtype", "hardware.engine.dtype", "hardware.verl"),
        "weights at the start": model_identity(initial_model(config, "train")[1]),
        "weights of the teacher": model_identity(config.teacher.path or "") if has_teacher(config, "train") else None,
        "data.train_file": file_identity(questions),
        "retriever": retriever_identity(config.retriever, read_rows(questions)),
    }


def _train(config: Config, folder: Path) -> Path:
    settings = train_settings(config)
    prepare_run_folder(folder, resume=config.resume)
    record_or_check(folder, settings)
    if config.resume and _is_finished(folder / "model", config):
        print(f"train: {folder} is finished already; to repeat it, delete the folder", file=sys.stderr)
        return folder / "model"
    check_target(folder / "model", key="run_dir", stage="train", replace=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    export_environment(config.hardware)
    ray_cluster.use_token(folder)
    mark_processes(folder)
    _clear_remains(folder)
    forget_failure(folder)
    print(f"train: models and engine start, which takes a minute or more; their output: {folder / LOG}", flush=True)
    try:
        _run_with_restarts(with_own_questions(config, folder), folder)
        model = export_models(config, folder, settings)
        print(f"model in {model}; next: python -m dgpo test run_dir={config.run_dir} test.models.trained={model}")
        return model
    except RunStoppedError as error:
        write_failure(folder, error)
        raise


def with_own_questions(config: Config, folder: Path) -> Config:
    """A copy that reads questions from files in the stage's folder, with our columns alone, whatever theirs hold."""
    own = replace(config.data)
    for name in ("train_file", "validation_file"):
        if theirs := getattr(config.data, name):
            path = folder / f"{name.removesuffix('_file')}_questions.parquet"
            write_rows(path, [trained_row(row) for row in read_rows(theirs)])
            setattr(own, name, str(path))
    return replace(config, data=own)


def _clear_remains(folder: Path) -> None:
    """What a run in this folder that has ended, or was killed, left behind on this machine."""
    end_processes(folder, grace_s=EXIT_GRACE_S)
    remove_remains()


def _plan(config: Config) -> str:
    """What would run, in one sentence."""
    train, term = config.train, config.train.teacher_term
    teacher = f"with {config.teacher.path} ({term.form}, {term.gate})"
    guide = teacher if has_teacher(config, "train") else "without a teacher"
    length = f"{train.num_steps} steps of {train.batch_size * train.samples_per_question} episodes"
    return f"{initial_model(config, 'train')[1]} would be trained by {train.algorithm} {guide}, {length}"


def _is_finished(model: Path, config: Config) -> bool:
    """Whether the model of the last step is there; with more steps than before, the run goes on."""
    return (model / MANIFEST).exists() and (
        read_manifest(model, stage="train")["counts"]["steps"] >= config.train.num_steps
    )


def _run_with_restarts(config: Config, folder: Path) -> None:
    """Runs veRL to the end, starting it again from a checkpoint after a fault, or where the collapse detector asks."""
    num_faults = 0
    while True:
        try:
            return _run_verl(with_absolute_paths(after_rollbacks(config, folder)), folder)
        except CollapseError as error:
            event = roll_back(folder, error)
            print(
                f"rollback {event['rollback']} of {config.train.stability.max_rollbacks} to step {event['to_step']} "
                f"({folder / EVENTS}): {error}",
                file=sys.stderr,
                flush=True,
            )
        except FaultError as error:
            num_faults += 1
            config = _after_fault(config, folder, error, num_faults)


def _after_fault(config: Config, folder: Path, error: FaultError, num_faults: int) -> Config:
    """The configuration that goes on, where another restart is allowed."""
    step = max(checkpoint_steps(folder / "checkpoints", CHECKPOINT), default=0)
    message = f"{error}. The last checkpoint is of step {step}" if step else f"{error}. There is no checkpoint yet"
    print("\n".join(error.log), file=sys.stderr)
    if num_faults > config.train.max_restarts:
        raise RunStoppedError(f"{message}; resume=true continues") from error
    print(f"{message}; restart {num_faults} of {config.train.max_restarts}", file=sys.stderr, flush=True)
    return replace(config, resume=True)


def _run_verl(config: Config, folder: Path) -> None:
    """One run of veRL's trainer.

    Raises:
        RunStoppedError: the trainer stopped for a reason that its user can act on.
        StoppedOnRequestError: it was asked to.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from dgpo.rl.task_runner import TaskRunner

    checkpoint = _start(folder.resolve() / "checkpoints", config)
    try:
        environment = {
            **VERL_ENVIRONMENT,
            **own_critic(config.hardware),
            **own_folders(folder.resolve()),
            **mark(folder),
        }
        log = folder.resolve() / LOG
        ray_cluster.connect(config.hardware, token_folder=folder, environment=environment, listener=divert(log))
        ray_cluster.claim()
        # After Ray's start, which sets a handler of its own.
        with translated_ray_errors(folder), stop_file_on_signal(folder):
            # With the driver: where another node is lost, the trainer is there to say so.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            runner = ray.remote(TaskRunner).options(scheduling_strategy=here).remote()
            ray.get(runner.run.remote(config, folder.resolve(), checkpoint))
    finally:
        ray.shutdown()
        _clear_remains(folder)


def own_folders(folder: Path) -> dict[str, str]:
    """Where veRL's loggers and data sets' cache write, unless the shell says otherwise.

    Theirs are the working directory, /tmp and HOME, shared by runs whose names are equal.
    """
    places = {
        "TENSORBOARD_DIR": folder / "tensorboard",
        "WANDB_DIR": folder,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "SWANLAB_LOG_DIR": folder / "swanlab",
        "TRACKIO_DIR": folder / "trackio",
        "VERL_FILE_LOGGER_PATH": folder / "verl_metrics.jsonl",
        "HF_DATASETS_CACHE": folder / "datasets_cache",
    }
    return {name: os.environ.get(name, str(place)) for name, place in places.items()}


def own_critic(hardware: HardwareConfig) -> dict[str, str]:
    """The plugin that keeps veRL from giving the critic flash attention, where another one was asked for.

    A platform's own plugin, in `hardware.env`, has it already.
    """
    asks = hardware.attention != "flash_attention_2"
    return {"VERL_USE_EXTERNAL_MODULES": "dgpo.platforms.critic"} if asks else {}


def _start(checkpoints: Path, config: Config) -> Path | None:
    """The checkpoint to go on from, whatever number of GPUs wrote it; None for the beginning."""
    if not config.resume:
        return None
    checkpoint = newest_whole(checkpoints, CHECKPOINT)
    set_aside_later(checkpoints, CHECKPOINT, checkpoint)
    if checkpoint is None:
        print(f"train: no whole checkpoint in {checkpoints}, begins with step 1", file=sys.stderr, flush=True)
        return None
    wrote, now = read_seal(checkpoint)["world_size"], config.hardware.num_gpus
    others = "" if wrote == now else f", which {wrote} GPUs wrote, on {now}"
    print(f"train: continues from {checkpoint}{others}", file=sys.stderr, flush=True)
    return checkpoint
