"""Log-probs, entropy and the exact teacher term of policy tokens, without logits of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dgpo.algorithms.fused_linear import add_product, compute_dtype

LOG_PROB, ENTROPY, TEACHER_KL = range(3)  # columns of `token_terms`


@dataclass(frozen=True)
class TeacherStates:
    """A frozen teacher at some of the tokens.

    Attributes:
        at: [N] bool, the M tokens among the N whose KL is asked for.
        hidden: [M, H'] the teacher's last hidden states there (after its final norm), in order.
        head: [V', H'] its output matrix; a vocabulary padded further than the other's is cut.
    """

    at: torch.Tensor
    hidden: torch.Tensor
    head: torch.Tensor


def token_terms(
    hidden: torch.Tensor,
    *,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    teacher: TeacherStates | None = None,
) -> torch.Tensor:
    """What policy tokens are trained by, in nats: [N, 3] float32 (float64 for float64 states), no reduction.

    With p = softmax(hidden head^T / temperature) and the teacher's q, the columns are
    `LOG_PROB` log p[target]; `ENTROPY` -sum_v p_v log p_v; and `TEACHER_KL` KL(student || teacher) =
    sum_v p_v (log p_v - log q_v) over the shared vocabulary, the exact counterpart of the sampled k1 estimate in the
    paper's reward (DGPO, arXiv 2508.20324, section 3.2), 0 where `teacher` does not say.

    All three are differentiable in the student's states and output matrix. Logits of `chunk_size` tokens exist at a
    time: the backward pass makes them again, and sums the output matrix's gradient in float32.

    Args:
        hidden: [N, H] last hidden states (after the final norm) of the positions that predict a policy token.
        head: [V, H] the student's output matrix, whole (gathered, if it is sharded).
        targets: [N] ids of the predicted tokens.
        temperature: of sampling; the teacher's is 1.
        chunk_size: tokens whose logits exist at once.
        teacher: None for no third column but zeros.

    Raises:
        ValueError: the tensors disagree in their number of tokens.
    """
    if len(targets) != len(hidden):
        raise ValueError(f"{len(hidden)} hidden states but {len(targets)} targets: expected the same tokens")
    if teacher is None:
        return _TokenTerms.apply(hidden, head, targets, temperature, chunk_size, None, None, None)
    if (count := int(teacher.at.sum())) != len(teacher.hidden) or len(teacher.at) != len(hidden):
        raise ValueError(
            f"the teacher is asked for {count} of {len(teacher.at)} tokens, and has {len(teacher.hidden)} states for "
            f"{len(hidden)} tokens of the student: expected the same tokens"
        )
    states = teacher.hidden.detach(), teacher.head.detach()
    return _TokenTerms.apply(hidden, head, targets, temperature, chunk_size, teacher.at, *states)


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk_size, at, teacher_hidden, teacher_head):  # type: ignore[no-untyped-def]
        chunks = _Chunks(hidden, head, targets, temperature, chunk_size, at, teacher_hidden, teacher_head)
        terms = hidden.new_zeros(len(hidden), 3, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in chunks.parts():
            log_probs = chunks.log_probs(part)
            terms[part, LOG_PROB] = log_probs.gather(1, targets[part, None])[:, 0]
            terms[part, ENTROPY] = -_dot(log_probs.exp(), log_probs)
            if (shared := chunks.shared(part, log_probs)) is not None:
                student, teacher = shared
                terms[part, TEACHER_KL] = terms[part, TEACHER_KL].index_put(
                    (at[part],), _dot(student.exp(), student - teacher)
                )
        ctx.save_for_backward(hidden, head, targets, terms, at, teacher_hidden, teacher_head)
        ctx.temperature, ctx.chunk_size, ctx.dtype = temperature, chunk_size, chunks.dtype
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_terms):  # type: ignore[no-untyped-def]
        hidden, head, targets, terms, at, teacher_hidden, teacher_head = ctx.saved_tensors
        chunks = _Chunks(
            hidden, head, targets, ctx.temperature, ctx.chunk_size, at, teacher_hidden, teacher_head, dtype=ctx.dtype
        )
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=terms.dtype)
        for part in chunks.parts():
            log_probs = chunks.log_probs(part)
            shared = chunks.shared(part, log_probs)
            of_log_prob, of_entropy, of_kl = (column[:, None] for column in grad_terms[part].unbind(1))
            # d log p[y] / d logit_v = [v = y] - p_v; d entropy / d logit_v = -p_v (log p_v + entropy)
            probs = log_probs.exp()
            gradient = log_probs.add_(terms[part, ENTROPY, None]).mul_(-of_entropy).sub_(of_log_prob).mul_(probs)
            gradient.scatter_add_(1, targets[part, None], of_log_prob)
            del probs
            if shared is not None:  # d KL / d logit_v = p_v (log p_v - log q_v - KL)
                student, teacher = shared
                rows = at[part]
                of_rows = student.exp()
                of_rows.mul_(student.sub_(teacher).sub_(terms[part, TEACHER_KL, None][rows])).mul_(of_kl[rows])
                del shared, student, teacher
                gradient[rows, : of_rows.shape[1]] += of_rows
            products = gradient.div_(ctx.temperature).to(chunks.dtype)
            grad_hidden[part] = products @ chunks.head
            add_product(grad_head, products.T, hidden[part].to(chunks.dtype))
        return grad_hidden, grad_head.to(head.dtype), None, None, None, None, None, None


class _Chunks:
    """The tensors of both passes, a chunk at a time; products run in the states' type, or in autocast's."""

    def __init__(  # type: ignore[no-untyped-def]
        self, hidden, head, targets, temperature, chunk_size, at, teacher_hidden, teacher_head, *, dtype=None
    ):
        self.dtype: torch.dtype = dtype or compute_dtype(hidden)
        self.hidden, self.head = hidden, head.to(self.dtype)
        self.temperature, self.chunk_size = temperature, chunk_size
        self.at, self.teacher_hidden, self.teacher_head = at, teacher_hidden, teacher_head
        if at is not None:
            self.before: list[int] = F.pad(at.cumsum(0), (1, 0)).tolist()  # teacher's rows before each token

    def parts(self) -> list[slice]:
        count = len(self.hidden)
        return [slice(i, min(i + self.chunk_size, count)) for i in range(0, count, self.chunk_size)]

    def log_probs(self, part: slice) -> torch.Tensor:
        """[tokens, V] of the student, in a tensor of its own."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = _float(F.linear(self.hidden[part].to(self.dtype), self.head))
        logits = logits.div_(self.temperature)
        return logits.sub_(logits.logsumexp(1, keepdim=True))

    def shared(self, part: slice, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probs of both models over the vocabulary they share, of the tokens that the teacher is asked about."""
        if self.at is None or self.before[part.start] == self.before[part.stop]:
            return None
        vocab = min(self.head.shape[0], self.teacher_head.shape[0])
        states = self.teacher_hidden[self.before[part.start] : self.before[part.stop]]
        with torch.autocast(states.device.type, enabled=False):
            teacher = _float(F.linear(states, self.teacher_head[:vocab].to(states.dtype))).log_softmax(1)
        student = log_probs[self.at[part], :vocab]
        return (student if vocab == log_probs.shape[1] else student.log_softmax(1)), teacher


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[N] sums of products by row, without the products, and in their own type, which autocast would lower."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.linalg.vecdot(left, right)


def _float(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
