"""A token loss straight from hidden states and output matrices, never holding logits of all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dgpo.algorithms.distillation import TokenLoss
from dgpo.algorithms.reduce import divide

# Tokens whose loss is computed at once: few enough for a CPU's cache, enough to outweigh a GPU's cost per launch.
_LOSS_TOKENS_CPU, _LOSS_TOKENS_GPU = 8, 64
# Rows of the output matrix whose gradient exists twice, where it is summed in a wider type than the products'.
_ROWS_AT_ONCE = 16_384


def fused_linear_loss(
    token_loss: TokenLoss,
    *,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    targets: torch.Tensor,
    denominator: torch.Tensor | float,
    chunk_size: int,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i token_loss(logits_i) / denominator, a scalar, from chunks of tokens.

    A chunk's logits, values and gradient exist only while it is worked on. The gradients of the hidden states and of
    the output matrix are summed up in the forward pass already, with the matrix products of the plain form and no more;
    the backward pass scales them, in place: it can run once (not with `retain_graph`), and not be differentiated.

    Products run in the states' type, or in autocast's; the loss lifts the logits. The output matrix's gradient is
    summed in that matrix's own type: float32 for the float32 weights that this project trains; for bfloat16 weights
    bfloat16, rounded once per chunk, since a float32 sum would be twice the size of the gradient itself.

    Args:
        token_loss: pure, of the chunk's logits; no mask and no reduction inside.
        student_hidden: [N, H] last hidden states (after the final norm) of the positions that predict a counted token.
        student_head: [V, H] the student's output matrix, whole (gathered, if it is sharded).
        targets: [N] ids of the predicted tokens.
        denominator: what the sum is divided by: the number of such tokens in the whole batch, over all micro-batches.
        chunk_size: tokens whose logits exist at once. Each chunk reads and writes the output matrix's gradient once,
            and few tokens make slow matrix products; scripts/bench/kd_loss.py measures.
        teacher_hidden: [N, H'] the frozen teacher's at the same positions; None for a loss without a teacher.
        teacher_head: [V', H'].
        student_bias: [V] of the output layer, if it has one.

    Returns:
        A scalar in float32, or float64 for float64 states. N = 0 gives 0 with zero gradients.

    Raises:
        ValueError: the tensors disagree in their number of tokens, or only one of the teacher's two is given.
    """
    _check(student_hidden, targets, teacher_hidden, teacher_head)
    total = _FusedLinearLoss.apply(
        student_hidden,
        student_head,
        student_bias,
        None if teacher_hidden is None else teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detach(),
        targets,
        token_loss,
        chunk_size,
        torch.is_grad_enabled(),
    )
    return divide(total, denominator)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, head, bias, teacher_hidden, teacher_head, targets, token_loss, chunk_size, grad_enabled
    ):
        inputs = (hidden, head, bias)
        wanted = [grad_enabled and ctx.needs_input_grad[i] for i in range(len(inputs))]
        grads = [torch.zeros_like(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True)]
        grad_hidden, grad_head, grad_bias = grads
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        dtype = compute_dtype(hidden)
        head, bias = head.to(dtype), None if bias is None else bias.to(dtype)
        if teacher_head is not None:
            teacher_head = teacher_head.to(compute_dtype(teacher_hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_size):
                part = slice(start, start + chunk_size)
                states = hidden[part].to(dtype)
                logits = F.linear(states, head, bias)
                teacher_logits = None
                if teacher_hidden is not None:
                    teacher_logits = F.linear(teacher_hidden[part].to(teacher_head.dtype), teacher_head)
                total += _sum_values(token_loss, logits, teacher_logits, targets[part], to_gradient=any(wanted))
                del teacher_logits
                if grad_hidden is not None:
                    grad_hidden[part] = logits @ head
                if grad_head is not None:
                    add_product(grad_head, logits.T, states)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                del logits  # before the next chunk's are made
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        # In place: a scaled copy of the output matrix's gradient would double it. Autograd refuses a second pass.
        scaled = [None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def _sum_values(
    token_loss: TokenLoss,
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    to_gradient: bool,
) -> torch.Tensor:
    """The sum of the chunk's values; with `to_gradient`, its gradient is left in `logits`, in place of them.

    Matrix products want many tokens at a time, but what the loss computes on the way is several times as large as the
    logits: it gets a few tokens at a time.
    """
    block = _LOSS_TOKENS_CPU if logits.device.type == "cpu" else _LOSS_TOKENS_GPU
    starts = range(0, len(logits), block)
    sums = []
    for part in (slice(start, start + block) for start in starts):
        teacher_part = None if teacher_logits is None else teacher_logits[part]
        if not to_gradient:
            sums.append(token_loss(logits[part], teacher_part, targets[part]).sum())
            continue
        with torch.enable_grad():
            student_part = logits[part].detach().requires_grad_()
            value = token_loss(student_part, teacher_part, targets[part]).sum()
            (gradient,) = torch.autograd.grad(value, student_part)
        logits[part] = gradient
        sums.append(value.detach())
    return torch.stack(sums).sum()


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, in place, without a second matrix of its size."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, len(total), _ROWS_AT_ONCE):
        total[start : start + _ROWS_AT_ONCE] += left[start : start + _ROWS_AT_ONCE] @ right


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """In which products of these states run: autocast's type, or their own."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _check(
    student_hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
) -> None:
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("the teacher needs both its hidden states and its output matrix: only one was given")
    if len(targets) != len(student_hidden):
        raise ValueError(f"{len(student_hidden)} student states but {len(targets)} targets: expected the same tokens")
    if teacher_hidden is not None and len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"{len(student_hidden)} student states but {len(teacher_hidden)} of the teacher: expected the same tokens"
        )
