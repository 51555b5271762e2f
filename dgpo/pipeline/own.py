"""A search agent of your own: from a folder of documents and questions to a model that answers with sources.

documents -> passages -> index -> demonstrations -> cold start [-> DGPO] -> held-out questions -> ask

python -m dgpo own FOLDER [student.path=MODEL] [key=value ...]
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from dgpo.agent.trajectory import Trajectory, read_trajectories
from dgpo.checks import check_pipeline
from dgpo.config.load import chosen, load_config
from dgpo.config.model_files import check_model_folder, is_hub_name
from dgpo.config.schema import Config
from dgpo.config.stages import stage_model
from dgpo.data.own import prepare_own
from dgpo.errors import ConfigError
from dgpo.evaluation.scores import compare
from dgpo.files import atomic_write_text, read_jsonl
from dgpo.hardware.machine import check_start, memory_limit
from dgpo.metrics.exact_match import exact_match
from dgpo.models.smollm2 import NAME as SMALL_MODEL
from dgpo.models.smollm2 import find_gguf
from dgpo.pipeline.processes import PeakMemory, Stages, python_module, retrieval_server
from dgpo.runs.artifacts import MANIFEST
from dgpo.runs.asking import write_asking
from dgpo.runs.settings import record_or_check_command
from dgpo.runs.summary import print_results, read_results, table_console

OVERRIDES = ("world=own", "hardware=cpu", "experiment=seqkd")
HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
HUB_TIMEOUT_S = 3.0
HUB_MODEL_MEMORY = 12e9  # bytes that its cold start takes; with less the smaller model is the default
PASSES_PER_CORE = 80  # demonstrations that the cold start sees, over all epochs
NUM_EXAMPLES = 6
CORPUS = "own"
BEFORE, AGENT, RAG = "before", "agent", "rag"
OVERRIDE = re.compile(r"[+~]*[\w.-]+=")  # a folder whose name has = in it is given with a /, as ./lr=1


def own(arguments: Sequence[str]) -> Path | None:
    """Runs what is missing of the stages into `run_dir`, by default `runs/own-<folder>`; the same command continues.

    Returns:
        The run folder; None for a dry run.

    Raises:
        ConfigError: no folder, settings that do not go together, or no model to start from; nothing was started.
        DataError: the folder holds no usable documents or questions.
        DgpoError: a stage failed; the same command continues.
    """
    started = time.perf_counter()
    folders = [argument for argument in arguments if not OVERRIDE.match(argument)]
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        raise ConfigError(
            f"own takes one folder of documents and questions*.jsonl, not {' '.join(folders) or 'nothing'}: "
            "python -m dgpo own FOLDER"
        )
    source = Path(folders[0])
    asked = [argument for argument in arguments if OVERRIDE.match(argument)]
    overrides = [*OVERRIDES, *asked]
    if chosen("hardware", overrides) == "cpu":
        overrides = [*OVERRIDES, *sized_for_cpu(), *overrides[len(OVERRIDES) :]]
    if chosen("run_dir", overrides) is None:
        overrides.append(f"run_dir=runs/own-{source.resolve().name}")
    config = load_config(overrides)
    check_start(config, "train")
    run = Path(config.run_dir)
    student = config.student.path or default_student()
    check_pipeline(config)
    if config.dry_run:
        if student != SMALL_MODEL and not is_hub_name(student):
            check_model_folder(student, key="student.path")
        _say_counts(prepare_own(source, run / "data", config=config))
        print(f"dry run: {source} would become {run}: data, index, {', '.join(config.stages)} of {student}, test")
        return None
    record_or_check_command(run / "own.json", asked, folder=str(source.resolve()), student=student)
    stages = Stages(run, report_every_s=30, way_on="the same command continues")
    print(f"run folder: {run}   (logs: {stages.logs}); after a stop the same command continues", flush=True)
    with PeakMemory() as memory:
        counts = _prepare(source, run / "data", config)
        _build_index(stages, run)
        student = _fetch(stages, run, student)
        if not counts["questions"]:
            _offer_rag(run, overrides, student)
            return run
        with retrieval_server(stages, run / "indexes", default=CORPUS) as url:
            _run_stages(stages, run, _with_inputs(overrides, run, student, counts, url))
    stages.wall_s["total"] = round(time.perf_counter() - started, 1)
    _finish(run, config, overrides, student, stages.wall_s, memory.peak_bytes)
    return run


def sized_for_cpu() -> list[str]:
    """Threads as the process may use cores; bfloat16 where the CPU multiplies it; a buffer that holds an embedding."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    dtype = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    return [
        f"hardware.env.OMP_NUM_THREADS='{num_cores()}'",
        f"hardware.dtype={dtype}",
        f"hardware.engine.dtype={dtype}",
        "hardware.weight_bucket_mb=512",
        "hardware.remove_padding=true",  # RL: of a real model the layers cost more than attention over packed episodes
        "hardware.max_tokens_per_gpu=2048",
    ]


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def default_student() -> str:
    """A 0.5B model where the hub answers (or its cache has it) and memory allows, else the one in the package index.

    Raises:
        ConfigError: the hub does not answer, and the package is not installed.
    """
    if memory_limit() >= HUB_MODEL_MEMORY and hub_answers():
        return HUB_MODEL
    find_gguf()
    return SMALL_MODEL


def hub_answers() -> bool:
    """Whether the default model can be had without waiting: it is in the cache, or the hub answers within seconds."""
    import httpx
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_MODEL, "model.safetensors"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/{HUB_MODEL}/resolve/main/config.json"
        return get_session().head(url, timeout=HUB_TIMEOUT_S, follow_redirects=True).status_code < 400
    # No answer; an endpoint that is no URL; a certificate that cannot be read; a proxy of no known, or installed, kind.
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError):
        return False


def _prepare(source: Path, out: Path, config: Config) -> dict[str, int]:
    if not (out / MANIFEST).exists():
        prepare_own(source, out, config=config)
    counts: dict[str, int] = json.loads((out / MANIFEST).read_text())["counts"]
    _say_counts(counts)
    return counts


def _say_counts(counts: Mapping[str, int]) -> None:
    print(
        f"{counts['documents']} documents, {counts['passages']} passages; {counts['questions']} questions: "
        f"{counts['train']} to train on, {counts['held_out']} held out, on other documents"
        + (f"; {counts['dropped']} dropped, on documents of both" if counts["dropped"] else ""),
        flush=True,
    )


def _build_index(stages: Stages, run: Path) -> None:
    index = run / "indexes" / CORPUS
    if not index.is_dir():
        corpus = ["--corpus", str(run / "data" / "corpus.jsonl"), "--out", str(index)]
        stages.run(index=[*python_module("retriever.build"), *corpus])


def _fetch(stages: Stages, run: Path, student: str) -> str:
    """The path of the student; the one in the package index is converted first."""
    if student != SMALL_MODEL:
        return student
    if not (run / "student").is_dir():
        stages.run(student=[*python_module("dgpo.models.smollm2"), str(run / "student")])
    return str(run / "student")


def _with_inputs(overrides: Sequence[str], run: Path, student: str, counts: Mapping[str, int], url: str) -> list[str]:
    """What every stage gets: the user's settings last, so that they win."""
    data = run / "data"
    passes = PASSES_PER_CORE * num_cores()
    num_train = min(counts["train"], passes)
    own_settings = overrides[len(OVERRIDES) :]
    return [
        *OVERRIDES,
        f"student.path={student}",
        f"data.collect_file={data / 'train.parquet'}",
        f"data.train_file={data / 'train.parquet'}",
        *(f"data.test_files.{file.name.removesuffix('_test.parquet')}={file}" for file in test_files(run)),
        f"collect.max_questions={num_train}",
        f"distill.epochs={max(1, round(passes / num_train))}",
        *own_settings,
        f"retriever.url={url}",
    ]


def test_files(run: Path) -> list[Path]:
    """The held-out questions, a file for each data source."""
    return sorted((run / "data").glob("*_test.parquet"))


def _run_stages(stages: Stages, run: Path, common: Sequence[str]) -> None:
    """The stages of the experiment, then the student before and after, then plain RAG with the student as it was."""
    config = load_config(common)
    model, student = stage_model(config, config.stages[-1]), config.student.path
    tests = {
        "test": [f"test.models.{BEFORE}={student}", f"test.models.{AGENT}={model}", f"test.baseline={BEFORE}"],
        "rag": [f"test.models.{RAG}={student}", f"test.modes.{RAG}=rag", f"run_dir={run / 'rag'}"],
    }
    for name in (*config.stages, *tests):
        stage, more = ("test", tests[name]) if name in tests else (name, [])
        folder = run / "rag" / "test" if name == "rag" else run / name
        finished = folder / ("results.json" if stage == "test" else "model" if name == "train" else ".")
        if (finished / MANIFEST).exists() or (stage == "test" and finished.exists()):
            continue
        resume = ["resume=true"] if folder.is_dir() else []
        stages.run(**{name: [*python_module("dgpo"), stage, *common, *more, *resume]})


def _offer_rag(run: Path, overrides: Sequence[str], student: str) -> None:
    write_asking(run, overrides=_ask_overrides(overrides, rag=True), model=student, corpus=CORPUS, examples=[])
    print(
        "no questions: the index is built, and the model answers from it without having learnt to search (rag).\n"
        f"To train an agent, put questions with answers into the folder, questions.jsonl with lines such as\n  "
        '{"question": "Who wrote it?", "answers": ["Her name"]}\n'
        "(some 60 or more, on different documents), and choose another run_dir.\n"
        f'next: python -m dgpo ask run_dir={run} "your question"'
    )


def _ask_overrides(overrides: Sequence[str], *, rag: bool = False) -> list[str]:
    """The overrides that decide how a question is played."""
    decide = ("world=", "hardware", "episode.", "ask.", "seed=", "student.trust_remote_code")
    kept = [override for override in overrides if override.startswith(decide)]
    return [*kept, *(["ask.mode=rag"] if rag else [])]


def _finish(
    run: Path, config: Config, overrides: Sequence[str], student: str, wall_s: Mapping[str, float], peak_bytes: int
) -> None:
    from dgpo.evaluation.report import write_report
    from dgpo.runs.summary import update_summary

    model = stage_model(config, config.stages[-1])
    scores = read_jsonl(run / "test" / AGENT / "scores.jsonl")
    questions = [each["question"] for each in scores if each["em"]] or [each["question"] for each in scores]
    examples = questions[:: max(1, len(questions) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    write_asking(run, overrides=_ask_overrides(overrides), model=model, corpus=CORPUS, examples=examples)
    update_summary(run, wall_s=wall_s, seed=config.seed)
    with contextlib.suppress(ValueError, KeyError):
        write_report(run)
    gains = measure_gains(run)
    atomic_write_text(run / "gains.json", json.dumps(gains, indent=1) + "\n")
    print_results(read_results(run))
    print_gains(gains, student)
    times = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in wall_s.items())
    print(f"time: {times}\npeak memory of all processes {peak_bytes / 2**30:.1f} GiB")
    print(f"agent: {model}   report: {run / 'report.html'}\nnext: python -m dgpo ask run_dir={run} ask.web=true")


def measure_gains(run: Path) -> dict[str, Any]:
    """What the agent gains, paired and with 95% intervals, and what one gets without any agent.

    Returns:
        `agent_minus_before`, `agent_minus_rag` as [difference, low, high] of exact match; `rag` and `top_title` (always
        answering the title of the first passage), exact match; `hit_at_k`, the share of questions that have a gold in
        the first k passages for the question itself.
    """
    scores = {name: read_jsonl(run / "test" / name / "scores.jsonl") for name in (BEFORE, AGENT)}
    scores[RAG] = read_jsonl(run / "rag" / "test" / RAG / "scores.jsonl")
    played = list(read_trajectories(run / "rag" / "test" / RAG / "trajectories.jsonl"))
    return {
        "num_questions": len(scores[AGENT]),
        "agent_minus_before": compare(scores[AGENT], scores[BEFORE])["average"],
        "agent_minus_rag": compare(scores[AGENT], scores[RAG])["average"],
        **{name: _mean([score["em"] for score in scores[name]]) for name in (BEFORE, AGENT, RAG)},
        "top_title": _mean([_top_title_is_right(trajectory) for trajectory in played]),
        "hit_at_k": _mean([score["hit"] for score in scores[RAG]]),
        "k": max((len(record.documents) for each in played for record in each.searches), default=0),
    }


def _top_title_is_right(trajectory: Trajectory) -> float:
    documents = [document for record in trajectory.searches for document in record.documents]
    title = documents[0]["contents"].partition("\n")[0].strip('"') if documents else ""
    return float(exact_match(title, trajectory.golds))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def print_gains(gains: Mapping[str, Any], student: str) -> None:
    console = table_console()
    for name, other in (("before", "the same model before training"), ("rag", "rag with the same model")):
        difference, low, high = gains[f"agent_minus_{name}"]
        verdict = "more than" if low > 0 else "less than" if high < 0 else "not distinguishable from"
        interval = escape(f"[{low:+.3f}, {high:+.3f}]")
        console.print(f"agent against {name}: {difference:+.3f} {interval}, {verdict} {other}", highlight=False)
    console.print(
        f"without an agent: rag {gains['rag']:.3f}, always the top title {gains['top_title']:.3f}; the answer is in "
        f"the first {gains['k']} passages for {gains['hit_at_k']:.1%} of the questions   (model: {student})",
        highlight=False,
    )
