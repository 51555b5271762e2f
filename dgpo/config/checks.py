"""Cheap checks before anything expensive starts. Each problem is a `ConfigError`: one line that names the fix.

The checks of a stage return notes. A real run has none; a dry run has one for each input that cannot be looked into
yet: what an earlier stage of the experiment will write, and hub models where there is no hub to ask.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.artifacts import RunFolderExistsError
from dgpo.config.load import ConfigError
from dgpo.config.methods import ALGORITHMS, GATES, TEACHER_FORMS, rl_conflict
from dgpo.config.model_files import (
    HubUnreachableError,
    check_model_folder,
    max_positions,
    same_weights,
    tokenizer_difference,
)
from dgpo.config.schema import Config
from dgpo.config.stages import STAGES, collection, initial_model, is_planned
from dgpo.data.benchmarks import BENCHMARKS
from dgpo.data.rows import DataError, read_rows, row_id
from dgpo.extensions import ExtensionError, check_search, load_reward
from dgpo.search import RetrieverUnavailableError, check_health, read_token

HEALTH_TIMEOUT_S = 5.0
CHOICES = {
    "hardware.platform": ("cuda", "cpu"),
    "hardware.dtype": ("bfloat16", "float32", "float16"),
    "train.algorithm": ALGORITHMS,
    "train.teacher_term.form": TEACHER_FORMS,
    "train.teacher_term.gate": GATES,
    "train.stability.action": ("warn", "stop", "rollback"),
    "distill.loss": (
        "kd",
        "seqkd",
        "distillm",
        "taid",
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
    ),
    "distill.sharding": ("none", "full"),
    "test.compat": ("none", "upstream"),
}
POSITIVE = {  # section -> the keys whose values must be above 0
    "hardware": "num_nodes gpus_per_node micro_batch_size",
    "episode": "max_turns max_turn_tokens max_prompt_tokens max_response_tokens min_turn_tokens topk "
    "max_passage_tokens max_query_chars",
    "collect": "samples_per_question",
    "distill": "epochs batch_size learning_rate chunk_tokens",
    "train": "num_steps batch_size mini_batch_size samples_per_question temperature actor_learning_rate "
    "critic_learning_rate",
    "test": "samples upstream_batch_size",
}
LOGGERS = ("console", "tensorboard", "wandb")  # of the test


def check_collect(config: Config) -> list[str]:
    """What collection needs: the teacher, questions, a retriever that knows their corpora, lengths, a free folder."""
    notes: list[str] = []
    _check_values(config, "hardware", "episode", "collect")
    _check_stage_folder(config, "collect")
    rows = _check_rows(config.data.collect_file, key="data.collect_file")
    if _check_model(config, config.teacher.path, key="teacher.path", notes=notes):
        _check_lengths(config, "teacher.path", config.teacher.path)
    if config.collect.samples_per_question > 1 and config.collect.temperature <= 0:
        raise ConfigError(
            f"collect.samples_per_question={config.collect.samples_per_question} with collect.temperature=0 samples "
            "the same episode again: set a temperature above 0"
        )
    _check_retriever(config, rows)
    return notes


def check_distill(config: Config) -> list[str]:
    """What the cold start needs: collected episodes, a student, a different teacher that shares its tokenizer."""
    notes: list[str] = []
    _check_values(config, "hardware", "distill")
    _check_stage_folder(config, "distill")
    settings = config.distill
    _check_distill_values(config)
    key, student = initial_model(config, "distill")
    there = _check_model(config, student, key=key, notes=notes)
    if settings.loss != "seqkd":
        _check_teacher(config, key, student if there else None, notes)
    _check_collection(config, notes)
    if settings.loss == "distillm":
        _check_values(config, "episode")
        if there:
            _check_lengths(config, key, student)
        _check_retriever(config, [])
    return notes


def _check_distill_values(config: Config) -> None:
    settings, hardware = config.distill, config.hardware
    shares = {name: getattr(settings, name) for name in ("kl_ratio", "skew", "jsd_beta", "held_out_share")}
    shares |= {f"taid.{name}": getattr(settings.taid, name) for name in ("t_start", "t_end", "momentum")}
    shares["student_episodes.initial_threshold"] = settings.student_episodes.initial_threshold
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"distill.{name}={value}: expected a share between 0 and 1")
    if settings.taid.t_start > settings.taid.t_end:
        raise ConfigError(
            f"distill.taid.t_start={settings.taid.t_start} is above distill.taid.t_end={settings.taid.t_end}: lower it"
        )
    counts = {name: getattr(settings, name) for name in ("max_steps", "micro_batch_size", "evaluate_every", "patience")}
    counts["student_episodes.buffer_size"] = settings.student_episodes.buffer_size
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"distill.{name}={value}: expected at least 1")
    num_gpus = hardware.num_nodes * hardware.gpus_per_node
    if settings.batch_size < num_gpus:
        raise ConfigError(f"distill.batch_size={settings.batch_size} on {num_gpus} GPUs leaves some without an episode")
    if settings.sharding == "full" and num_gpus == 1:
        raise ConfigError("distill.sharding=full needs more than one GPU: set distill.sharding=none")
    if hardware.dtype == "float16":
        raise ConfigError("hardware.dtype=float16 overflows in distillation: use bfloat16 or float32")
    if settings.loss == "distillm":
        if settings.held_out_share == 0:
            raise ConfigError("distill.loss=distillm adapts to the held-out loss: set distill.held_out_share above 0")
        buffer = settings.student_episodes.buffer_size
        if buffer < settings.batch_size:
            raise ConfigError(
                f"distill.student_episodes.buffer_size={buffer} holds no batch of {settings.batch_size}: raise it"
            )


def check_train(config: Config) -> list[str]:
    """What RL needs, before Ray starts: models that match, questions, batches that divide, lengths, a retriever."""
    notes: list[str] = []
    _check_values(config, "hardware", "episode", "train")
    _check_stage_folder(config, "train")
    _check_stability(config)
    if config.train.reward:
        _check_extension(load_reward, config.train.reward)
    conflict = rl_conflict(config)
    if conflict:
        raise ConfigError(conflict)
    train, hardware = config.train, config.hardware
    rows = _check_rows(config.data.train_file, key="data.train_file")
    if len(rows) < train.batch_size:
        raise ConfigError(
            f"data.train_file={config.data.train_file} has {len(rows)} questions, fewer than "
            f"train.batch_size={train.batch_size}: lower train.batch_size or add questions"
        )
    if config.data.validation_file:
        rows += _check_rows(config.data.validation_file, key="data.validation_file")
    key, student = initial_model(config, "train")
    there = _check_model(config, student, key=key, notes=notes)
    if there:
        _check_lengths(config, key, student)
    if train.teacher_term.gate != "none":
        _check_teacher(config, key, student if there else None, notes)
    num_gpus = hardware.num_nodes * hardware.gpus_per_node
    _check_divides("train.batch_size", train.batch_size, "train.mini_batch_size", train.mini_batch_size)
    _check_divides(
        "train.batch_size x samples_per_question", train.batch_size * train.samples_per_question, "GPUs", num_gpus
    )
    episodes = train.mini_batch_size * train.samples_per_question
    _check_divides("train.mini_batch_size x samples_per_question", episodes, "GPUs", num_gpus)
    _check_divides(
        "episodes of a mini-batch per GPU", episodes // num_gpus, "hardware.micro_batch_size", hardware.micro_batch_size
    )
    _check_divides("GPUs", num_gpus, "hardware.engine.tensor_parallel_size", hardware.engine.tensor_parallel_size)
    if hardware.platform == "cpu" and hardware.num_nodes > 1:
        raise ConfigError(f"hardware.num_nodes={hardware.num_nodes} on the cpu platform: expected 1")
    _check_retriever(config, rows)
    return notes


def check_test(config: Config, stage: str = "test") -> list[str]:
    """What evaluation (`test`, or `arcap`) needs: checkpoints, test sets, lengths, a retriever, a free folder."""
    notes: list[str] = []
    _check_values(config, "hardware", "episode", "test")
    _check_stage_folder(config, stage)
    if not config.test.models:
        raise ConfigError("test.models is empty: name checkpoints, e.g. test.models.dgpo=runs/dgpo/train/model")
    if not config.data.test_files:
        raise ConfigError("data.test_files is empty: name test sets, e.g. data.test_files.nq=data/nq_test.parquet")
    _check_test_values(config)
    for name, path in config.test.models.items():
        if _check_model(config, path, key=f"test.models.{name}", notes=notes):
            _check_lengths(config, f"test.models.{name}", path)
    rows: list[dict[str, Any]] = []
    for name in config.test.sets or config.data.test_files:
        rows += _check_test_set(name, config.data.test_files[name])[: config.test.max_questions]
    if config.test.compat == "upstream" and len(rows) < config.test.upstream_batch_size:
        raise ConfigError(
            f"test.compat=upstream drops the last batch when it is not full, and {len(rows)} questions fill none of "
            f"test.upstream_batch_size={config.test.upstream_batch_size}: lower it"
        )
    _check_retriever(config, rows)
    return notes


def check_ask(config: Config) -> None:
    """What `ask` needs: a checkpoint, room for an episode, a prompt with a place for the question, a retriever."""
    _check_values(config, "hardware", "episode")
    ask = config.ask
    if not ask.model:
        raise ConfigError(
            "ask.model is not set: name a checkpoint, e.g. ask.model=runs/dgpo/train/model, or add world=tiny to use "
            "the latest quickstart's"
        )
    _check_model(config, ask.model, key="ask.model", notes=[])
    _check_lengths(config, "ask.model", ask.model)
    if ask.prompt is not None and "{question}" not in ask.prompt:
        raise ConfigError(f"ask.prompt={ask.prompt!r} has no place for the question: add {{question}} to it")
    if ask.temperature < 0:
        raise ConfigError(f"ask.temperature={ask.temperature}: expected 0 (greedy) or more")
    _check_retriever(config, [{"extra_info": {"corpus": ask.corpus}}])


def _check_test_values(config: Config) -> None:
    test = config.test
    for key, names in (("test.models", test.models), ("data.test_files", config.data.test_files)):
        for name in names:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ConfigError(f"{key}: the name {name!r} becomes a folder: use letters, digits and ._+- only")
    for name in test.sets or []:
        if name not in config.data.test_files:
            raise ConfigError(f"test.sets: unknown set {name!r}: {_near(name, config.data.test_files)}")
    if test.baseline is not None and test.baseline not in test.models:
        raise ConfigError(f"test.baseline={test.baseline}: expected one of test.models, {', '.join(test.models)}")
    for logger in test.loggers:
        if logger not in LOGGERS:
            raise ConfigError(f"test.loggers: unknown logger {logger!r}: {_near(logger, LOGGERS)}")
    if test.max_questions is not None and test.max_questions < 1:
        raise ConfigError(f"test.max_questions={test.max_questions}: expected at least 1, or null for all")
    if test.temperature is not None and test.temperature < 0:
        raise ConfigError(f"test.temperature={test.temperature}: expected 0 (greedy) or more")
    if test.samples > 1 and test.temperature == 0:
        raise ConfigError(
            f"test.samples={test.samples} with test.temperature=0 plays the same episode again: set a temperature "
            "above 0, or leave it out"
        )
    if test.compat == "upstream" and (test.samples > 1 or test.temperature not in (None, 1.0)):
        raise ConfigError(
            f"test.compat=upstream takes one sample at temperature 1, but test.samples={test.samples} and "
            f"test.temperature={test.temperature}: leave both out"
        )


def _check_test_set(name: str, file: str) -> list[dict[str, Any]]:
    """The rows, each with an id of its own, and of the benchmark that the set is named after, if it is one."""
    key = f"data.test_files.{name}"
    rows = _check_rows(file, key=key)
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        first = seen.setdefault(row_id(row), index)
        if first != index:
            raise ConfigError(
                f"{key}: {file}, rows {first} and {index} have the id {row_id(row)!r}: give each an extra_info.id of "
                "its own"
            )
    sources = {row["data_source"] for row in rows}
    if name in BENCHMARKS and sources & set(BENCHMARKS) - {name}:
        raise ConfigError(f"{key}={file}: its rows are of {', '.join(sorted(sources))}: name the set after them")
    return rows


def _near(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}expected some of {', '.join(choices)}"


def _check_values(config: Config, *sections: str) -> None:
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or len(set(config.stages)) < len(config.stages):
        raise ConfigError(f"stages={config.stages}: expected each of {', '.join(STAGES)} at most once")
    for key, choices in CHOICES.items():
        section, *rest = key.split(".")
        value: Any = getattr(config, section)
        for name in rest:
            value = getattr(value, name)
        if section in sections and value not in choices:
            raise ConfigError(f"{key}={value}: expected one of {', '.join(choices)}")
    for section in sections:
        for name in POSITIVE[section].split():
            value = getattr(getattr(config, section), name)
            if value <= 0:
                raise ConfigError(f"{section}.{name}={value}: expected more than 0")
    if "episode" in sections:
        _check_episode(config)


def _check_stage_folder(config: Config, stage: str) -> None:
    folder = Path(config.run_dir) / stage
    if not config.resume and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderExistsError(f"{folder} exists: continue it with resume=true, or choose another run_dir")


def _check_rows(file: str | None, *, key: str) -> list[dict[str, Any]]:
    if not file:
        raise ConfigError(f"{key} is not set: name a parquet file of questions")
    try:
        return read_rows(file)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_model(config: Config, path: str | None, *, key: str, notes: list[str]) -> bool:
    """Whether the model is there to be looked into; if not, a real run is refused and a dry run gets a note."""
    if path and not Path(path).is_dir():
        if is_planned(config, path):
            if not config.dry_run:
                raise ConfigError(
                    f"{key}={path} does not exist: run the stage before it ({Path(path).parent.name}) with this "
                    f"run_dir first, or set {key} to a checkpoint"
                )
            notes.append(f"{key}={path}: will be written by an earlier stage")
            return False
        if config.dry_run and path == config.teacher.path and config.teacher.init and Path(path).name == "model":
            notes.append(f"{key}={path}: will be made from {config.teacher.init} by experiment=teacher_ppo")
            return False
    try:
        check_model_folder(path, key=key)
    except HubUnreachableError as error:
        if not config.dry_run:
            raise
        notes.append(f"not checked: {error}")
        return False
    return True


def _check_collection(config: Config, notes: list[str]) -> None:
    folder = collection(config)
    episodes = folder / "episodes.jsonl"
    if not episodes.is_file():
        if config.dry_run and "collect" in config.stages:
            notes.append(f"{episodes}: will be written by collect")
            return
        raise ConfigError(f"{episodes} does not exist: run `python -m dgpo collect` with this run_dir first")
    if not episodes.stat().st_size:
        raise ConfigError(f"{episodes} is empty: the teacher answered no question; see {folder / 'manifest.json'}")


def _check_teacher(config: Config, student_key: str, student: str | None, notes: list[str]) -> None:
    """The teacher, and that it fits the student; `student` is None where that one cannot be looked into yet."""
    teacher = config.teacher.path
    if not teacher:
        raise ConfigError(
            "teacher.path is not set: name the teacher, or train without one (train.teacher_term.gate=none, "
            "distill.loss=seqkd)"
        )
    there = _check_model(config, teacher, key="teacher.path", notes=notes)
    if not there or student is None:
        return
    if same_weights(student, teacher):
        raise ConfigError(
            f"the teacher is the student: {student_key}={student} and teacher.path={teacher} hold the same weights; "
            "set teacher.path to a stronger model"
        )
    difference = tokenizer_difference(student, teacher, keys=(student_key, "teacher.path"))
    if difference:
        raise ConfigError(
            f"{student_key}={student} and teacher.path={teacher} have different tokenizers ({difference}): the teacher "
            "scores the student's tokens, so choose two models of one family"
        )


def _check_lengths(config: Config, key: str, model: str | None) -> None:
    episode = config.episode
    total = episode.max_prompt_tokens + episode.max_response_tokens
    positions = max_positions(model or "", key=key)
    if positions is not None and total > positions:
        raise ConfigError(
            f"episode.max_prompt_tokens + max_response_tokens = {total}, but {key}={model} has {positions} "
            "positions: lower one of them"
        )


def _check_episode(config: Config) -> None:
    episode = config.episode
    if episode.min_turn_tokens > episode.max_turn_tokens:
        raise ConfigError(
            f"episode.min_turn_tokens={episode.min_turn_tokens} is above episode.max_turn_tokens="
            f"{episode.max_turn_tokens}: lower it"
        )
    search = episode.max_turn_tokens + episode.topk * episode.max_passage_tokens + episode.min_turn_tokens
    if search > episode.max_response_tokens:
        raise ConfigError(
            f"one turn, its {episode.topk} passages and the next turn take up to {search} tokens, more than "
            f"episode.max_response_tokens={episode.max_response_tokens}: raise it, or lower episode.max_turn_tokens, "
            "topk or max_passage_tokens"
        )


def _check_divides(name: str, value: int, divisor_name: str, divisor: int | None) -> None:
    if divisor and value % divisor:
        raise ConfigError(f"{name}={value} is not a multiple of {divisor_name}={divisor}: change one of them")


def _check_stability(config: Config) -> None:
    stability = config.train.stability
    for name in ("patience", "window"):
        if getattr(stability, name) < 1:
            raise ConfigError(f"train.stability.{name}={getattr(stability, name)}: expected at least 1")
    for name in ("max_entropy_ratio", "max_kl_ratio", "max_grad_norm_ratio"):
        if getattr(stability, name) <= 1:
            raise ConfigError(
                f"train.stability.{name}={getattr(stability, name)}: expected more than 1, times a healthy value"
            )
    if not 0 < stability.rollback_learning_rate_scale <= 1:
        raise ConfigError(
            f"train.stability.rollback_learning_rate_scale={stability.rollback_learning_rate_scale}: expected a share "
            "above 0 and at most 1"
        )


def _check_extension(check: Callable[[Any], object], argument: Any) -> None:
    try:
        check(argument)
    except ExtensionError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _check_retriever(config: Config, rows: Sequence[Mapping[str, Any]]) -> None:
    if config.retriever.backend:
        _check_extension(check_search, config.retriever)
        return  # it has no server, and does not name its corpora
    try:
        token = read_token(config.retriever.token_file)
        health = check_health(config.retriever.url, timeout_s=HEALTH_TIMEOUT_S, token=token)
    except (RetrieverUnavailableError, ValueError) as error:
        raise ConfigError(str(error)) from None
    served = health.get("corpora")
    if served is None:
        return  # another server of the same protocol: it has one corpus and does not name it
    wanted = {row["extra_info"].get("corpus") for row in rows} - {None}
    missing = sorted(wanted - set(served))
    if missing:
        raise ConfigError(
            f"the questions search in corpus {missing[0]!r}, but {config.retriever.url} serves {', '.join(served)}: "
            "start it with an --index for each corpus"
        )
