import math

import pytest
import torch
import torch.nn.functional as F

from dgpo.algorithms.exact_kl import exact_reverse_kl


def naive(student_logits, rows, teacher_hidden, teacher_head):
    vocab = min(student_logits.shape[-1], teacher_head.shape[0])
    student = student_logits[rows, :vocab].log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head[:vocab].T).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return {
        "student_logits": torch.randn(7, 13, generator=generator, dtype=torch.float64).requires_grad_(),
        "rows": torch.tensor([1, 4, 6, 0, 2]),
        "teacher_hidden": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "teacher_head": torch.randn(13, 3, generator=generator, dtype=torch.float64),
    }


def test_hand_worked_value():
    # Student (3/4, 1/4), teacher (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    kl = exact_reverse_kl(
        torch.tensor([[math.log(3.0), 0.0]]),
        rows=torch.tensor([0]),
        teacher_hidden=torch.tensor([[0.0]]),
        teacher_head=torch.tensor([[1.0], [1.0]]),
        chunk_size=4,
    )
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_values_and_gradients_equal_autograd_for_every_chunk_size(case, chunk_size):
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    kl = exact_reverse_kl(**case, chunk_size=chunk_size)
    (kl * weights).sum().backward()
    logits = case["student_logits"].detach().clone().requires_grad_()
    expected = naive(logits, case["rows"], case["teacher_hidden"], case["teacher_head"])
    (expected * weights).sum().backward()
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case["student_logits"].grad, logits.grad, atol=1e-6, rtol=1e-5)


def test_rows_that_do_not_count_get_no_gradient(case):
    exact_reverse_kl(**case, chunk_size=2).sum().backward()
    assert (case["student_logits"].grad[[3, 5]] == 0).all()


def test_a_padded_vocabulary_is_cut_to_the_shared_part(case):
    padded = torch.cat([case["teacher_head"], torch.full((3, 3), 9.0, dtype=torch.float64)])
    kl = exact_reverse_kl(**{**case, "teacher_head": padded}, chunk_size=2)
    torch.testing.assert_close(kl, exact_reverse_kl(**case, chunk_size=2))


def test_equal_distributions_have_zero_kl_and_zero_gradient(case):
    hidden, head = case["teacher_hidden"], case["teacher_head"]
    logits = F.linear(hidden, head).requires_grad_()
    kl = exact_reverse_kl(logits, rows=torch.arange(5), teacher_hidden=hidden, teacher_head=head, chunk_size=2)
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert logits.grad.abs().max() < 1e-6


def test_no_rows_give_an_empty_result_and_zero_gradient(case):
    empty = {**case, "rows": torch.empty(0, dtype=torch.long), "teacher_hidden": torch.empty(0, 3, dtype=torch.float64)}
    kl = exact_reverse_kl(**empty, chunk_size=2)
    assert kl.shape == (0,)
    kl.sum().backward()
    assert (case["student_logits"].grad == 0).all()


def test_mismatched_rows_are_refused(case):
    with pytest.raises(ValueError, match="5 rows but 4 teacher states"):
        exact_reverse_kl(**{**case, "teacher_hidden": case["teacher_hidden"][:4]}, chunk_size=2)
