"""The rooms without an engine stay light: a newcomer's `--help`, tests and tools must not wait for torch or Ray."""

import subprocess
import sys

LIGHT_ROOMS = [
    "dgpo.agent.protocol",
    "dgpo.agent.episode",
    "dgpo.agent.trajectory",
    "dgpo.agent.search",
    "dgpo.runs.artifacts",
    "dgpo.data.rows",
    "dgpo.data.download",
    "dgpo.data.prepare",
    "dgpo.metrics.exact_match",
    "dgpo.metrics.hits",
    "dgpo.metrics.intervals",
    "dgpo.metrics.repetition",
    "dgpo.config.load",
    "dgpo.hardware.dry_run",
    "dgpo.agent.plugins",
    "dgpo.runs.stability",
    "dgpo.runs.rollback",
    "dgpo.slurm.render",
    "dgpo.runs.stopping",
]
ALGORITHMS = ["reduce", "divergences", "selective_kl", "chunked_head", "distillation"]
ENGINES = ("verl", "ray", "vllm", "transformers", "datasets")
SCRIPT = """
import importlib, sys, time
if {torch_first}: import torch, torch.utils.checkpoint
started = time.process_time()
for name in {modules}: importlib.import_module(name)
print(time.process_time() - started, *[name for name in {heavy} if name in sys.modules])
"""


def imported(modules, heavy, *, torch_first=False):
    """CPU seconds of importing `modules` in a fresh interpreter, and which of `heavy` came with them."""
    script = SCRIPT.format(modules=modules, heavy=heavy, torch_first=torch_first)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    seconds, *loaded = result.stdout.split()
    return float(seconds), loaded


def test_the_rooms_without_an_engine_import_in_under_a_second_without_torch():
    runs = [imported(LIGHT_ROOMS, (*ENGINES, "torch")) for _ in range(2)]
    assert all(loaded == [] for _, loaded in runs)
    assert min(seconds for seconds, _ in runs) < 1.0


def test_the_algorithms_need_only_torch():
    seconds, loaded = imported([f"dgpo.algorithms.{name}" for name in ALGORITHMS], ENGINES, torch_first=True)
    assert loaded == []
    assert seconds < 1.0
