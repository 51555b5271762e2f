"""The cold start's loss from hidden states in chunks against two whole logit tensors: time and peak memory.

    python scripts/bench/kd_loss.py                          # 0.5B student, 3B teacher, vocabulary 151,936; minutes
    python scripts/bench/kd_loss.py --vocab 32000 --tokens 256   # seconds
    python scripts/bench/kd_loss.py --chunks 32 64 128 256   # how the chunk size matters

One measurement is the forward and backward pass of KL(teacher || student), mean over the tokens, from the last hidden
states of both models to the gradients of the student's states and output matrix. `plain` holds both models' float32
logits of all tokens under autograd. The forms run in turn, each repetition in a process of its own. Memory is the peak
above inputs, weights and gradients: of the process's resident set on a CPU, of PyTorch's allocator on a GPU. The
chunked form is held to an eighth of the memory and 1.2 times the time of the plain one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STUDENT_WIDTH, TEACHER_WIDTH = 896, 2048  # Qwen2.5-0.5B and 3B
VOCABULARY = 151_936


def measure(form: str, *, tokens: int, vocab: int, chunk: int, threads: int, device: str) -> dict[str, float]:
    """One forward and backward pass in this process: seconds, GB above its inputs, weights and gradients."""
    import torch
    import torch.nn.functional as F

    from dgpo.algorithms.divergences import forward_kl
    from dgpo.algorithms.fused_linear import fused_linear_loss

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    # States of unit variance and heads of 2 / sqrt(H) give logits with a standard deviation of 2.
    student_hidden = torch.randn(tokens, STUDENT_WIDTH, device=device, requires_grad=True)
    student_head = (torch.randn(vocab, STUDENT_WIDTH, device=device) * 2 / STUDENT_WIDTH**0.5).requires_grad_()
    teacher_hidden = torch.randn(tokens, TEACHER_WIDTH, device=device)
    teacher_head = torch.randn(vocab, TEACHER_WIDTH, device=device) * 2 / TEACHER_WIDTH**0.5
    targets = torch.zeros(tokens, dtype=torch.long, device=device)

    def chunked() -> torch.Tensor:
        return fused_linear_loss(
            lambda student, teacher, _targets: forward_kl(student, teacher),
            student_hidden=student_hidden,
            student_head=student_head,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            targets=targets,
            denominator=tokens,
            chunk_size=chunk,
        )

    def plain() -> torch.Tensor:
        with torch.no_grad():
            teacher_log_probs = F.linear(teacher_hidden, teacher_head).log_softmax(-1)
        student_log_probs = F.linear(student_hidden, student_head).log_softmax(-1)
        return F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="sum") / tokens

    torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()  # loads the BLAS library
    before_gb = start_of_memory(torch, device)
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = chunked() if form == "chunked" else plain()
    loss.backward()
    value = loss.item()  # waits for a GPU
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    gradients_gb = (student_hidden.grad.nbytes + student_head.grad.nbytes) / 2**30
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": peak_of_memory(torch, device) - before_gb - gradients_gb,
        "loss": value,
        "gradient_norm": student_head.grad.norm().item(),
    }


def start_of_memory(torch: Any, device: str) -> float:
    """Forgets earlier peaks; returns the GB in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status_gb("VmRSS")


def peak_of_memory(torch: Any, device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else _status_gb("VmHWM")


def _status_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


def measure_in_process(form: str, sizes: dict[str, Any]) -> dict[str, float]:
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    return json.loads(subprocess.check_output([sys.executable, __file__, "--form", form, *flags]))


def main() -> None:
    import torch

    from dgpo.config.schema import DistillConfig

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--tokens", type=int, help="default: 4096 on a GPU; 1024 on a CPU, 5 GB in all")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--chunks", type=int, nargs="+", default=[DistillConfig().chunk_tokens], metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--form", choices=("chunked", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = options.tokens or (4096 if options.device == "cuda" else 1024)
    sizes = {"tokens": tokens, "vocab": options.vocab, "threads": options.threads, "device": options.device}
    if options.form:
        print(json.dumps(measure(options.form, chunk=options.chunk, **sizes)))
        return
    forms = {"plain": ("plain", tokens)} | {f"chunked, {chunk}": ("chunked", chunk) for chunk in options.chunks}
    print(
        f"{sizes}, student width {STUDENT_WIDTH}, teacher width {TEACHER_WIDTH}, float32, PyTorch {torch.__version__}"
    )
    print(f"plain: log_softmax and kl_div of two logit tensors of {tokens * options.vocab * 4 / 2**30:.2f} GB each")
    print("chunked: fused_linear_loss of forward_kl, so many tokens at once", flush=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for _ in range(options.repetitions):
        for name, (form, chunk) in forms.items():
            runs[name].append(measure_in_process(form, {**sizes, "chunk": chunk}))
            last = runs[name][-1]
            print(f"  {name}: {last['seconds']:.2f} s, {last['peak_gb']:.3f} GB", file=sys.stderr, flush=True)
    print(f"medians of {options.repetitions} in turn; in brackets the median of the ratios to plain of the same turn:")
    for name, measured in runs.items():
        report(name, measured, runs["plain"])


def report(name: str, measured: list[dict[str, float]], plain: list[dict[str, float]]) -> None:
    median = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
    ratio = {
        key: statistics.median(run[key] / reference[key] for run, reference in zip(measured, plain, strict=True))
        for key in ("seconds", "cpu_seconds", "peak_gb")
    }
    print(
        f"{name:13} {median['seconds']:6.2f} s ({ratio['seconds']:.2f}), of a processor {median['cpu_seconds']:6.2f} s "
        f"({ratio['cpu_seconds']:.2f}); {median['peak_gb']:6.3f} GB ({ratio['peak_gb']:.3f}); "
        f"loss {median['loss']:.6f}, gradient norm {median['gradient_norm']:.6f}"
    )


if __name__ == "__main__":
    main()
