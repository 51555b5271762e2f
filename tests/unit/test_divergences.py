import json
import math
from pathlib import Path

import pytest
import torch

from dgpo.algorithms.divergences import cross_entropy, forward_kl, reverse_kl
from dgpo.algorithms.reduce import masked_mean

CASES = json.loads((Path(__file__).parents[1] / "golden" / "divergences.json").read_text())["cases"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=CASES, ids=["small", "medium", "sharp"])
def golden(request):
    student, teacher = (torch.tensor(request.param[name]) for name in ("student_logits", "teacher_logits"))
    mask = torch.tensor(request.param["labels"]) != -100
    return student, teacher, mask, request.param["values"]


def test_values_by_hand():
    # Student (3/4, 1/4), teacher (1/2, 1/2).
    student, teacher = torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert reverse_kl(student, teacher).item() == pytest.approx(0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2))
    assert cross_entropy(student[None], torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_both_directions_equal_trls(golden):
    student, teacher, mask, values = golden
    assert masked_mean(forward_kl(student, teacher), mask).item() == pytest.approx(values["trl_jsd_beta_0"], rel=1e-5)
    assert masked_mean(reverse_kl(student, teacher), mask).item() == pytest.approx(values["trl_jsd_beta_1"], rel=1e-5)


def test_both_directions_agree_with_distillm(golden):
    student, teacher, mask, values = golden
    # DistiLLM's forward loss leaves out the teacher's entropy, a constant in the student.
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    forward = masked_mean(forward_kl(student, teacher) + entropy, mask)
    assert forward.item() == pytest.approx(values["forward_kl"], rel=1e-5)
    assert masked_mean(reverse_kl(student, teacher), mask).item() == pytest.approx(values["reverse_kl"], rel=1e-5)


def test_one_direction_is_the_other_with_the_roles_swapped(golden):
    student, teacher, *_ = golden
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_equal_distributions_have_zero_divergence_and_gradient(divergence):
    logits = torch.randn(4, 9)
    student = (logits + 3.0).requires_grad_()  # a shift of all logits is the same distribution
    value = divergence(student, logits)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_the_gradient_of_forward_kl_is_student_minus_teacher():
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_tokens_that_neither_can_produce_do_not_matter(divergence):
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    blocked = torch.full((3, 2), -torch.inf)
    padded = torch.cat([student, blocked], -1).requires_grad_()
    value = divergence(padded, torch.cat([teacher, blocked], -1))
    torch.testing.assert_close(value, divergence(student, teacher))
    value.sum().backward()
    assert padded.grad.isfinite().all()


def test_half_precision_logits_are_lifted():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    value = reverse_kl(student.bfloat16(), teacher.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reverse_kl(student.bfloat16().float(), teacher.bfloat16().float()))
