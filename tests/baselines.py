"""Records what runs of the tiny world compute, and compares two recordings: a refactoring must change nothing.

    python tests/baselines.py world --world DIR                            # the inputs: once, by the code before
    python tests/baselines.py record --world DIR --out A [--only NAME,..]  # goes on where it was stopped
    python tests/baselines.py compare A B [--only NAME,..]                 # exit status 1 where they differ

Records the code that `python -m dgpo` finds: call it in the root of a checkout, with PYTHONPATH set to that. Only
commands, configuration keys and files of run folders are used, so that a recording does not depend on where code lives.
One episode and one search at a time, because sums over batches whose make-up depends on timing differ in their last
digits. `A/NAME.json` holds the SHA-256 of every weight and of every file of episodes, and every metric of every step.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from safetensors.torch import load_file

COMMON = [
    *("world=tiny", "hardware=cpu", "run_dir={out}/{unit}", "retriever.url={url}"),
    *("train.generation_concurrency=1", "hardware.engine.concurrency=1", "retriever.max_queries_per_request=1"),
    *("student.path={models}/student_untrained", "teacher.path={models}/teacher", "train.init={models}/student"),
    *("data.collect_file={data}/collect.parquet", "data.train_file={data}/train.parquet"),
]
STEPS = [
    *("train.num_steps=6", "train.batch_size=16", "train.mini_batch_size=8", "train.save_every=3"),
    *("train.log_episodes_every=1", "train.num_logged_episodes=16"),
]
FEWER_QUESTIONS = ["train.batch_size=4", "train.mini_batch_size=8", "train.samples_per_question=4"]
VALIDATED = ["data.validation_file={data}/validation_32.parquet", "train.validate_every=3"]
TESTED = ["data.test_files.real={data}/test.parquet", "test.max_questions=100"]
UNITS: dict[str, tuple[str, list[str]]] = {  # name -> (command, overrides)
    "collect": ("collect", ["collect.max_questions=64"]),
    "distill": ("distill", ["distill.episodes={out}/collect/collect"]),
    "ppo-reward": ("train", [*STEPS, "train.teacher_term.form=reward", "train.init_kl_coef=0.001"]),
    "ppo-token": ("train", [*STEPS, "train.teacher_term.form=token", "train.reuse_log_probs_within=0.001"]),
    "ppo-exact": ("train", [*STEPS, "train.teacher_term.form=exact", *VALIDATED]),
    "grpo": ("train", ["experiment=dgpo_grpo", *STEPS, *FEWER_QUESTIONS, "train.teacher_term.form=reward"]),
    "gkd-token": ("train", ["experiment=kd_gkd", *STEPS, "train.teacher_term.form=token"]),
    "gkd-exact": ("train", ["experiment=kd_gkd", *STEPS, "train.teacher_term.form=exact"]),
    "test": ("test", [*TESTED, "test.models.teacher={models}/teacher", "test.models.student={models}/student"]),
}
# What depends on the moment: recorded as null, so that their names are compared and their values are not.
TIMED = re.compile(r"^timing|(^|/)perf/|memory|^step_s$|^tokens_per_s$")
MAX_RELATIVE_DIFFERENCE = 1e-12
TIMEOUT_S = 900.0


def make_world(folder: Path) -> None:
    """What the quickstart's commands make, and a student that has begun to search; keeps what is there."""
    world, models = folder / "world", folder / "world" / "models"
    begun = Path(__file__).parent / "engine" / "begun_student.py"
    steps: dict[Path, list[object]] = {
        world / "manifest.json": ["-m", "dgpo.tinyworld", "build", "--out", world],
        folder / "indexes": ["-m", "retriever.build", "--corpus", world / "corpora", "--out", folder / "indexes"],
        models / "teacher" / "manifest.json": ["-m", "dgpo.tinyworld", "teacher", "--out", world],
        models / "student" / "model.safetensors": [begun, world],
    }
    for made, step in steps.items():
        if not made.exists():
            subprocess.run([sys.executable, *map(str, step)], check=True)
    questions = parquet.read_table(world / "data" / "validation.parquet")
    parquet.write_table(questions.slice(0, 32), world / "data" / "validation_32.parquet")


def record(world: Path, out: Path, names: Sequence[str]) -> None:
    """Runs the named units that `out` does not hold yet, and writes `<name>.json` of each."""
    missing = [name for name in names if not (out / f"{name}.json").exists()]
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    code = subprocess.check_output([sys.executable, "-c", "import dgpo; print(dgpo.__file__)"], text=True)
    print(f"code under test: {code.strip()}", flush=True)
    with retrieval_server(world / "indexes", out) as url:
        for name in missing:
            started = time.monotonic()
            shutil.rmtree(out / name, ignore_errors=True)  # of a recording that was stopped
            command = [sys.executable, "-m", "dgpo", *arguments(name, world=world, out=out, url=url)]
            with process(command, out / f"{name}.log") as child:
                if status := child.wait(TIMEOUT_S):
                    raise SystemExit(f"{name}: exit status {status}, see {out / name}.log")
            temporary = out / f".{name}.tmp"
            temporary.write_text(json.dumps(read_run(out / name / UNITS[name][0]), indent=1, sort_keys=True) + "\n")
            temporary.rename(out / f"{name}.json")
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def arguments(name: str, *, world: Path, out: Path, url: str) -> list[str]:
    """The command of a unit, with its overrides."""
    command, overrides = UNITS[name]
    values = {"unit": name, "out": out, "url": url, "data": world / "world/data", "models": world / "world/models"}
    return [command, *(each.format_map(values) for each in [*COMMON, *overrides])]


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
    """What a stage's folder says that it computed: name -> checksum, or the value of a metric, or null."""
    episodes = [path for path in sorted(stage.rglob("*.jsonl")) if path.name != "metrics.jsonl"]
    return {
        **{f"weights/{name}": _tensor_sha256(tensor) for name, tensor in _weights(stage).items()},
        **{f"episodes/{path.relative_to(stage)}": _episodes_sha256(path) for path in episodes},
        **{
            f"metrics/{number}/{name}": None if TIMED.search(name) else value
            for number, metrics in enumerate(_metrics(stage), start=1)
            for name, value in metrics.items()
        },
    }


def _metrics(stage: Path) -> list[dict[str, Any]]:
    """The records of distill and train, one of all models of test, or the counts of collect."""
    if (stage / "metrics.jsonl").exists():
        return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    if (stage / "results.json").exists():
        models = json.loads((stage / "results.json").read_text())["models"]
        return [{f"{model}/{name}": value for model in models for name, value in models[model]["metrics"].items()}]
    return [json.loads((stage / "manifest.json").read_text())["counts"]]


def _weights(stage: Path) -> dict[str, torch.Tensor]:
    """The weights of the stage's model and, where there is one, of the last checkpoint's critic."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(stage.glob("model/*.safetensors")):
        tensors |= {f"model/{name}": tensor for name, tensor in load_file(path).items()}
    critics = stage.glob("checkpoints/global_step_*/critic/model_world_size_1_rank_0.pt")
    for path in sorted(critics, key=lambda path: int(path.parts[-3].rpartition("_")[2]))[-1:]:
        state = torch.load(path, map_location="cpu", weights_only=False)
        tensors |= {f"critic/{name}": getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}
    return tensors


def _tensor_sha256(tensor: torch.Tensor) -> str:
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits).hexdigest()


def _episodes_sha256(path: Path) -> str:
    """The hash of the records in their order, their keys sorted, without how long searches took."""
    lines = [json.loads(line, object_hook=_timeless) for line in path.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "latency_s"}


def compare(a: Path, b: Path, names: Sequence[str]) -> list[str]:
    """The differences between two recordings, one line each; a unit that one of them lacks is one."""
    differences = []
    for name in names:
        absent = [str(path) for folder in (a, b) if not (path := folder / f"{name}.json").exists()]
        if absent:
            differences.append(f"{name}: not recorded: {', '.join(absent)}")
            continue
        ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for folder in (a, b))
        for key in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(key, "absent"), theirs.get(key, "absent")
            if not _same(one, other):
                differences.append(f"{name}: {key}: {one} and {other}")
    return differences


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
    a, b = options.recordings
    differences = compare(a, b, names)
    print("\n".join(differences) or f"equal: {', '.join(names)}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
