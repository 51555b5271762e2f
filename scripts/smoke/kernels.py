"""Step 2: the losses in the GPU's precision against plain float64 on the CPU, their peaks, RoPE, and exact search."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from smoke.checks import Checks, relative_error
from smoke.models import make_model, random_ids, shape

from dgpo.algorithms import divergences
from dgpo.algorithms.chunked_head import TeacherStates, token_terms
from dgpo.algorithms.fused_linear import fused_linear_loss
from dgpo.hardware import memory

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
PEAK_TOLERANCE = 0.15  # measured memory may differ from the plan's by this share
CHUNK = 64
DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward KL": divergences.forward_kl,
    "reverse KL": divergences.reverse_kl,
    "Jensen-Shannon": lambda student, teacher: divergences.generalised_jsd(student, teacher, beta=0.5),
    "skew KL": lambda student, teacher: divergences.skew_forward_kl(student, teacher, skew=0.1),
    "TAID": lambda student, teacher: divergences.taid(student, teacher, t=0.5),
}


def run(checks: Checks, *, device: str, folder: Path) -> None:
    for dtype in TOLERANCE:
        tensors = _inputs(device, dtype)
        _exact(checks, tensors, dtype)
        _fused(checks, tensors, dtype)
        _divergences(checks, tensors, dtype)
    _rope(checks, device)
    _search(checks, device)
    _faiss(checks, device)


def _inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states and output matrices of a student and a teacher; logits with a spread of a few nats."""
    student, teacher = shape("qwen2.5-0.5b", device=device), shape("qwen2.5-3b", device=device)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    tokens, vocab = 128, student["vocab_size"]
    return {
        "hidden": draw(tokens, student["hidden_size"]),
        "head": draw(vocab, student["hidden_size"]) / student["hidden_size"] ** 0.5,
        "teacher_hidden": draw(tokens, teacher["hidden_size"]),
        "teacher_head": draw(vocab, teacher["hidden_size"]) / teacher["hidden_size"] ** 0.5,
        "targets": random_ids(tokens, vocab=vocab, seed=1, device=device),
    }


def _in_float64(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in tensors.items()}


def _log_probs(tensors: dict[str, torch.Tensor], side: str) -> torch.Tensor:
    return F.linear(tensors[f"{side}hidden"], tensors[f"{side}head"]).log_softmax(-1)


def _exact(checks: Checks, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Log-probs, entropies and KL(student || teacher), and the gradient of the student's states."""
    hidden, head = (tensors[name].clone().requires_grad_() for name in ("hidden", "head"))
    at = torch.arange(len(hidden), device=hidden.device) % 2 == 0
    teacher = TeacherStates(at, tensors["teacher_hidden"][at], tensors["teacher_head"])
    device = hidden.device.type
    with _Peak(device) as peak:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):  # as in RL
            terms = token_terms(
                hidden, head=head, targets=tensors["targets"], temperature=1.0, chunk_size=CHUNK, teacher=teacher
            )
        terms.sum().backward()
    exact = _in_float64(tensors)
    states = exact["hidden"].requires_grad_()
    log_p, log_q = F.linear(states, exact["head"]).log_softmax(-1), _log_probs(exact, "teacher_")
    expected = [
        log_p.gather(1, exact["targets"][:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        (log_p.exp() * (log_p - log_q)).sum(-1) * at.cpu(),
    ]
    torch.stack(expected).sum().backward()
    for name, found, value in zip(("log-probs", "entropies", "exact reverse KL"), terms.T, expected, strict=True):
        checks.below(f"{name}, {_name(dtype)}", relative_error(found, value), TOLERANCE[dtype])
    checks.below(f"  their gradient, {_name(dtype)}", relative_error(hidden.grad, states.grad), TOLERANCE[dtype])
    if peak.bytes is not None:  # chunks, and the output matrix's gradient in float32 and its own type (budget.py)
        estimate = memory.CHUNK_COPIES[True] * 4 * CHUNK * len(head) + head.numel() * (4 + head.element_size())
        checks.within(f"  their peak, over the plan's, {_name(dtype)}", peak.bytes / estimate, 1, PEAK_TOLERANCE)


def _fused(checks: Checks, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The cold start's loss from hidden states and output matrices, and the gradients of the student's."""
    hidden, head = (tensors[name].clone().requires_grad_() for name in ("hidden", "head"))
    with _Peak(hidden.device.type) as peak:
        loss = fused_linear_loss(
            lambda student, teacher, targets: divergences.forward_kl(student, teacher),
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=tensors["teacher_hidden"],
            teacher_head=tensors["teacher_head"],
            targets=tensors["targets"],
            denominator=float(len(hidden)),
            chunk_size=CHUNK,
        )
        loss.backward()
    exact = _in_float64(tensors)
    own = {name: exact[name].requires_grad_() for name in ("hidden", "head")}
    student, teacher = _log_probs(exact, ""), _log_probs(exact, "teacher_")
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    expected.backward()
    checks.below(f"fused loss, {_name(dtype)}", relative_error(loss, expected), TOLERANCE[dtype])
    for name, tensor in (("hidden", hidden), ("head", head)):
        error = relative_error(tensor.grad, own[name].grad)
        checks.below(f"  gradient of the {name}, {_name(dtype)}", error, TOLERANCE[dtype])
    if peak.bytes is not None:  # the output matrix's gradient, and four chunks in float32
        estimate = head.numel() * head.element_size() + 4 * 4 * CHUNK * len(head)
        checks.within(f"  its peak, over the plan's, {_name(dtype)}", peak.bytes / estimate, 1, PEAK_TOLERANCE)


def _divergences(checks: Checks, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    logits = [F.linear(tensors[f"{side}hidden"][:16], tensors[f"{side}head"]) for side in ("", "teacher_")]
    exact = [each.cpu().double() for each in logits]
    worst = max(relative_error(value(*logits), value(*exact)) for value in DIVERGENCES.values())
    checks.below(f"{len(DIVERGENCES)} divergences, {_name(dtype)}", worst, TOLERANCE[dtype])


def _rope(checks: Checks, device: str) -> None:
    """What a position table in bfloat16 would do to a frozen model's log-probs: the table must stay in float32."""
    model = make_model(
        "qwen2.5-0.5b", seed=0, device=device, dtype=torch.bfloat16, layers=None if device == "cuda" else 2
    )
    table = model.model.rotary_emb.inv_freq
    checks.true("the position table of a model in bfloat16", table.dtype == torch.float32, table.dtype)
    ids = random_ids(1, 2000 if device == "cuda" else 200, vocab=model.config.vocab_size, seed=2, device=device)
    with torch.no_grad():
        right = model(ids).logits.float().log_softmax(-1)
        model.model.rotary_emb.inv_freq = table.to(torch.bfloat16).float()
        rounded = model(ids).logits.float().log_softmax(-1)
    checks.number("KL from a rounded position table", float((right.exp() * (right - rounded)).sum(-1).mean()))


def _search(checks: Checks, device: str) -> None:
    """The retrieval server's exact scan: recall of the best row, and queries per second."""
    from retriever.scan import TorchScan

    count, width = (2_000_000, 768) if device == "cuda" else (20_000, 64)
    rows, queries = _vectors(count, width), _vectors(256, width)
    scan = TorchScan(rows, device=device)
    scan.candidates(queries[:32], 16)
    started = time.perf_counter()
    found, _ = scan.candidates(queries, 16)
    checks.number("scan, queries per s", len(queries) / (time.perf_counter() - started))
    best = [(query @ rows.T).argmax() for query in queries[:32]]
    recall = np.mean([row in candidates for row, candidates in zip(best, found, strict=False)])
    checks.true("scan finds the best row of each query", recall == 1, f"{recall:.3f}")


def _faiss(checks: Checks, device: str) -> None:
    if importlib.util.find_spec("faiss") is None:
        checks.number("faiss", "not installed")
        return
    import faiss

    rows, queries = _vectors(50_000, 64), _vectors(32, 64)
    index: Any = faiss.IndexFlatIP(64)
    index.add(rows)
    if device == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            checks.number("faiss", "the CPU build")
            return
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    _, found = index.search(queries, 1)
    checks.true("faiss finds the best row of each query", (found[:, 0] == (queries @ rows.T).argmax(1)).all())


def _vectors(count: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(count).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Peak:
    """Bytes of tensors on the GPU at the most, above what was there before; None on a CPU, which does not count."""

    def __init__(self, device: str) -> None:
        self.bytes: int | None = None
        self.counts = device == "cuda"

    def __enter__(self) -> _Peak:
        if self.counts:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.counts:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
