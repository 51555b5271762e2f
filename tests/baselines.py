"""Records what runs of the tiny world compute, and compares two recordings: a refactoring must change nothing.

    python tests/baselines.py world   --world DIR                          # the inputs, made once, by the older code
    python tests/baselines.py record  --world DIR --out A [--only NAME,..]  # `NAME.json` per run; goes on where it stopped
    python tests/baselines.py compare A B [--only NAME,..]                  # exit status 1 where they differ

The code under test is the one that `python -m dgpo` finds: record with PYTHONPATH set to its checkout, and from there.
Only commands, configuration keys and files of run folders are used. One episode and one search at a time, because sums
over batches whose make-up depends on timing differ in their last digits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPEATABLE = ["train.generation_concurrency=1", "hardware.engine.concurrency=1", "retriever.max_queries_per_request=1"]
STEPS = [
    *("train.num_steps=6", "train.batch_size=16", "train.mini_batch_size=8", "train.save_every=3"),
    *("train.log_episodes_every=1", "train.num_logged_episodes=16"),
]
FEWER_QUESTIONS = ["train.batch_size=4", "train.mini_batch_size=2", "train.samples_per_question=4"]
UNITS: dict[str, tuple[str, list[str]]] = {  # name -> (command, overrides)
    "collect": ("collect", ["collect.max_questions=64"]),
    "distill": ("distill", ["distill.episodes={out}/collect/collect"]),
    "ppo-reward": ("train", [*STEPS, "train.teacher_term.form=reward", "train.init_kl_coef=0.001"]),
    "ppo-token": ("train", [*STEPS, "train.teacher_term.form=token", "train.reuse_log_probs_within=0.001"]),
    "ppo-exact": (
        "train",
        [*STEPS, "train.teacher_term.form=exact", "data.validation_file={validation}", "train.validate_every=3"],
    ),
    "grpo": ("train", ["experiment=dgpo_grpo", *STEPS, *FEWER_QUESTIONS, "train.teacher_term.form=reward"]),
    "gkd-token": ("train", ["experiment=kd_gkd", *STEPS, "train.teacher_term.form=token"]),
    "gkd-exact": ("train", ["experiment=kd_gkd", *STEPS, "train.teacher_term.form=exact"]),
    "test": ("test", ["test.models.teacher={teacher}", "test.models.student={student}", "test.max_questions=100"]),
}
# Of the moment: their names are compared, their values are not.
TIMED = re.compile(r"^timing|^perf/|/perf/|/mfu|memory|^step_s$|^tokens_per_s$|^train_")
NUM_VALIDATED = 32
MAX_RELATIVE_DIFFERENCE = 1e-12
TIMEOUT_S = 900.0


def make_world(folder: Path) -> None:
    """World, indexes and teacher as the quickstart makes them, a student that has begun to search; skips what is there."""
    import pyarrow.parquet as parquet

    world, models = folder / "world", folder / "world" / "models"
    begun = Path(__file__).parent / "engine" / "begun_student.py"
    for made, arguments in {
        world / "manifest.json": ["-m", "dgpo.tinyworld", "build", "--out", world],
        folder / "indexes": ["-m", "retriever.build", "--corpus", world / "corpora", "--out", folder / "indexes"],
        models / "teacher" / "manifest.json": ["-m", "dgpo.tinyworld", "teacher", "--out", world],
        models / "student" / "model.safetensors": [begun, world],
    }.items():
        if not made.exists():
            subprocess.run([sys.executable, *map(str, arguments)], check=True)
    questions = parquet.read_table(world / "data" / "validation.parquet")
    parquet.write_table(questions.slice(0, NUM_VALIDATED), folder / "validation.parquet")


def record(world: Path, out: Path, names: Sequence[str]) -> None:
    """Runs the named units that `out` does not hold yet, and writes `<name>.json` of each."""
    missing = [name for name in names if not (out / f"{name}.json").exists()]
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    code = subprocess.run([sys.executable, "-c", "import dgpo; print(dgpo.__file__)"], capture_output=True, text=True)
    print(f"code under test: {code.stdout.strip()}", flush=True)
    with retrieval_server(world / "indexes", out) as url:
        for name in missing:
            started = time.monotonic()
            shutil.rmtree(out / name, ignore_errors=True)  # of a recording that was stopped
            command = [sys.executable, "-m", "dgpo", *arguments(name, world=world, out=out, url=url)]
            with process(command, out / f"{name}.log") as child:
                code = child.wait(TIMEOUT_S)
            if code != 0:
                raise SystemExit(f"{name}: exit status {code}, see {out / name}.log")
            temporary = out / f".{name}.tmp"
            temporary.write_text(json.dumps(read_run(out / name / UNITS[name][0]), indent=1, sort_keys=True) + "\n")
            temporary.rename(out / f"{name}.json")
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def arguments(name: str, *, world: Path, out: Path, url: str) -> list[str]:
    """The command of a unit, with its overrides."""
    stage, overrides = UNITS[name]
    data, models = world / "world" / "data", world / "world" / "models"
    teacher, student, validation = models / "teacher", models / "student", world / "validation.parquet"
    inputs = [
        f"student.path={models / 'student_untrained'}",
        f"teacher.path={teacher}",
        f"train.init={student}",
        f"data.collect_file={data / 'collect.parquet'}",
        f"data.train_file={data / 'train.parquet'}",
        f"data.test_files.real={data / 'test.parquet'}",
        f"retriever.url={url}",
        f"run_dir={out / name}",
    ]
    own = [each.format(out=out, teacher=teacher, student=student, validation=validation) for each in overrides]
    return [stage, "world=tiny", "hardware=cpu", *inputs, *REPEATABLE, *own]


@contextlib.contextmanager
def process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child that does not outlive the context."""
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()


@contextlib.contextmanager
def retrieval_server(indexes: Path, out: Path) -> Iterator[str]:
    """Serves every index while the context lasts; yields the address."""
    port_file = out / "port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "retriever.serve", "--port", "0", "--port-file", str(port_file)]
    for folder in sorted(path for path in indexes.iterdir() if path.is_dir()):
        command += ["--index", f"{folder.name}={folder}"]
    with process([*command, "--default", "real"], out / "retriever.log") as child:
        while not port_file.exists():
            if child.poll() is not None:
                raise SystemExit(f"the retrieval server ended, see {out / 'retriever.log'}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"


def read_run(stage: Path) -> dict[str, Any]:
    """What a stage's folder says that it computed: checksums of weights and episodes, and metrics per step."""
    records = read_metrics(stage)
    return {
        "weights": read_weights(stage),
        "episodes": {
            str(path.relative_to(stage)): episodes_sha256(path)
            for path in sorted(stage.rglob("*.jsonl"))
            if path.name != "metrics.jsonl"
        },
        "metrics": [{name: value for name, value in each.items() if not TIMED.search(name)} for each in records],
        "metric_names": sorted(set().union(*records)),
    }


def read_metrics(stage: Path) -> list[dict[str, float]]:
    """Of every step (distill, train), of all models in one record (test), or the counts (collect)."""
    if (stage / "metrics.jsonl").exists():
        return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    if (stage / "results.json").exists():
        models = json.loads((stage / "results.json").read_text())["models"]
        return [{f"{name}/{key}": value for name, each in models.items() for key, value in each["metrics"].items()}]
    return [json.loads((stage / "manifest.json").read_text())["counts"]]


def read_weights(stage: Path) -> dict[str, str]:
    """Checksums of the tensors of the stage's model and, where there is one, of the last checkpoint's critic."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted((stage / "model").glob("*.safetensors")):
        tensors |= {f"model/{name}": tensor for name, tensor in load_file(path).items()}
    critics = stage.glob("checkpoints/global_step_*/critic/model_world_size_1_rank_0.pt")
    for path in sorted(critics, key=lambda path: int(path.parts[-3].rpartition("_")[2]))[-1:]:
        state = torch.load(path, map_location="cpu", weights_only=False)
        tensors |= {f"critic/{name}": getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}
    return {name: tensor_sha256(tensor) for name, tensor in tensors.items()}


def tensor_sha256(tensor: Any) -> str:
    """Of type, shape and bits."""
    import torch

    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits).hexdigest()


def episodes_sha256(path: Path) -> str:
    """Of the file's records in their order, with sorted keys and without how long a search took."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key != "latency_s"}

    lines = [json.loads(line, object_hook=timeless) for line in path.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256("\n".join(json.dumps(line, sort_keys=True) for line in lines).encode()).hexdigest()


def compare(a: Path, b: Path, names: Sequence[str]) -> list[str]:
    """The differences between two recordings, one line each."""
    differences = []
    for name in names:
        paths = [folder / f"{name}.json" for folder in (a, b)]
        absent = [str(path) for path in paths if not path.exists()]
        if absent:
            differences.append(f"{name}: not recorded: {', '.join(absent)}")
        else:
            ours, theirs = (json.loads(path.read_text()) for path in paths)
            differences += [f"{name}: {each}" for each in compare_runs(ours, theirs)]
    return differences


def compare_runs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """The differences between what two runs computed."""
    for kind in ("weights", "episodes"):
        yield from _compare_names(kind, a[kind], b[kind])
        yield from (f"{kind}: {key} differs" for key in a[kind] if key in b[kind] and a[kind][key] != b[kind][key])
    yield from _compare_names("metric", a["metric_names"], b["metric_names"])
    if len(a["metrics"]) != len(b["metrics"]):
        yield f"metrics: {len(a['metrics'])} records and {len(b['metrics'])}"
    for number, (ours, theirs) in enumerate(zip(a["metrics"], b["metrics"], strict=False), start=1):
        for name in ours.keys() | theirs.keys():
            if not _same(ours.get(name), theirs.get(name)):
                yield f"metrics: record {number}: {name} is {ours.get(name)} and {theirs.get(name)}"


def _compare_names(
    kind: str, a: Sequence[str] | Mapping[str, str], b: Sequence[str] | Mapping[str, str]
) -> Iterator[str]:
    for name in sorted(set(a) ^ set(b)):
        yield f"{kind}: {name} is only in the {'first' if name in a else 'second'}"


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return a == b
    return math.isclose(a, b, rel_tol=MAX_RELATIVE_DIFFERENCE) or (math.isnan(a) and math.isnan(b))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("world", "record"):
        commands.add_parser(name).add_argument("--world", type=Path, required=True)
    commands.choices["record"].add_argument("--out", type=Path, required=True)
    commands.add_parser("compare").add_argument("recordings", type=Path, nargs=2)
    for name in ("record", "compare"):
        commands.choices[name].add_argument("--only", default=",".join(UNITS), help="names, separated by commas")
    options = parser.parse_args()
    if options.command == "world":
        make_world(options.world.resolve())
        return 0
    names = options.only.split(",")
    if unknown := set(names) - set(UNITS):
        parser.error(f"--only={options.only}: {sorted(unknown)} unknown, expected some of {', '.join(UNITS)}")
    if options.command == "record":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the children are ended too
        record(options.world.resolve(), options.out.resolve(), names)
        return 0
    differences = compare(*options.recordings, names)
    print("\n".join(differences) or f"equal: {', '.join(names)}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
