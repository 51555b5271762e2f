import json
import math
from pathlib import Path

import pytest
import torch

from dgpo.algorithms.divergences import (
    align_vocabularies,
    cross_entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
)
from dgpo.algorithms.reduce import masked_mean

CASES = json.loads((Path(__file__).parents[1] / "golden" / "divergences.json").read_text())["cases"]
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.1": lambda student, teacher: generalised_jsd(student, teacher, beta=0.1),
    "jensen_shannon": lambda student, teacher: generalised_jsd(student, teacher, beta=0.5),
    "skew_forward_kl": lambda student, teacher: skew_forward_kl(student, teacher, skew=0.1),
    "skew_reverse_kl": lambda student, teacher: skew_reverse_kl(student, teacher, skew=0.1),
    "taid": lambda student, teacher: taid(student, teacher, t=0.4),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=CASES, ids=["small", "medium", "sharp"])
def golden(request):
    student, teacher = (torch.tensor(request.param[name]) for name in ("student_logits", "teacher_logits"))
    mask = torch.tensor(request.param["labels"]) != -100
    return student, teacher, mask, request.param["values"]


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def two_tokens():
    """Student (3/4, 1/4), teacher (1/2, 1/2)."""
    return torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)


def kl(left, right):
    return sum(a * math.log(a / b) for a, b in zip(left, right, strict=True))


def test_values_by_hand():
    student, teacher = two_tokens()
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert reverse_kl(student, teacher).item() == pytest.approx(0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2))
    assert cross_entropy(student[None], torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_mixtures_by_hand():
    student, teacher = two_tokens()
    p, q = (0.75, 0.25), (0.5, 0.5)
    mostly_student = (0.7, 0.3)  # 0.2 q + 0.8 p
    mostly_teacher = (0.55, 0.45)  # 0.2 p + 0.8 q
    jsd = 0.2 * kl(q, mostly_student) + 0.8 * kl(p, mostly_student)
    assert generalised_jsd(student, teacher, beta=0.2).item() == pytest.approx(jsd, rel=1e-5)
    assert skew_forward_kl(student, teacher, skew=0.2).item() == pytest.approx(kl(q, mostly_student), rel=1e-5)
    assert skew_reverse_kl(student, teacher, skew=0.2).item() == pytest.approx(kl(p, mostly_teacher), rel=1e-5)


def test_taid_by_hand():
    student, teacher = torch.tensor([math.log(9.0), 0.0]), torch.zeros(2)
    # Half of the logits (log 9, 0) and half of (0, 0) are (log 3, 0): the target is (3/4, 1/4).
    assert taid(student, teacher, t=0.5).item() == pytest.approx(kl((0.75, 0.25), (0.9, 0.1)), rel=1e-5)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_trl_jsd_is_ours_with_the_same_beta(golden, beta):
    student, teacher, mask, values = golden
    ours = masked_mean(generalised_jsd(student, teacher, beta=beta), mask)
    assert ours.item() == pytest.approx(values[f"trl_jsd_beta_{beta}"], rel=1e-5)


def test_distillm_js_distance_weighs_the_student(golden):
    student, teacher, mask, values = golden
    ours = masked_mean(generalised_jsd(student, teacher, beta=1 - 0.9), mask)  # lam = 0.9 is the student's share
    assert ours.item() == pytest.approx(values["js_distance"], rel=1e-5)


def test_distillm_forward_kl_is_a_cross_entropy(golden):
    student, teacher, mask, values = golden
    ours = masked_mean(forward_kl(student, teacher) + entropy(teacher), mask)
    assert ours.item() == pytest.approx(values["forward_kl"], rel=1e-5)


def test_distillm_reverse_kl_is_a_true_kl(golden):
    student, teacher, mask, values = golden
    assert masked_mean(reverse_kl(student, teacher), mask).item() == pytest.approx(values["reverse_kl"], rel=1e-5)


def test_distillm_symmetric_kl_mixes_its_cross_entropy_with_a_true_kl(golden):
    student, teacher, mask, values = golden
    ours = 0.1 * (forward_kl(student, teacher) + entropy(teacher)) + 0.9 * reverse_kl(student, teacher)
    assert masked_mean(ours, mask).item() == pytest.approx(values["symmetric_kl"], rel=1e-5)


def test_distillm_skewed_forward_kl_is_a_cross_entropy_against_a_tenth_of_the_teacher(golden):
    student, teacher, mask, values = golden
    ours = masked_mean(skew_forward_kl(student, teacher, skew=0.1) + entropy(teacher), mask)
    assert ours.item() == pytest.approx(values["skewed_forward_kl"], rel=1e-5)


def test_distillm_skewed_reverse_kl_is_a_true_kl_against_a_tenth_of_the_student(golden):
    student, teacher, mask, values = golden
    ours = masked_mean(skew_reverse_kl(student, teacher, skew=0.1), mask)
    assert ours.item() == pytest.approx(values["skewed_reverse_kl"], rel=1e-5)


@pytest.mark.parametrize("t", [0, 0.4, 0.7, 1])
def test_sakanas_taid_is_a_cross_entropy_with_the_interpolated_target(golden, t):
    student, teacher, mask, values = golden
    ours = masked_mean(taid(student, teacher, t=t) + entropy((1 - t) * student + t * teacher), mask)
    assert ours.item() == pytest.approx(values[f"taid_t_{t}"], rel=1e-5)


def test_one_direction_is_the_other_with_the_roles_swapped():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    torch.testing.assert_close(skew_forward_kl(student, teacher, skew=0.2), skew_reverse_kl(teacher, student, skew=0.2))
    torch.testing.assert_close(generalised_jsd(student, teacher, beta=0.2), generalised_jsd(teacher, student, beta=0.8))


def test_without_skew_the_skew_kls_are_the_plain_ones():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(skew_forward_kl(student, teacher, skew=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher))


def test_jsd_over_beta_tends_to_forward_and_over_its_complement_to_reverse():
    student, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    small = 1e-6
    forward = generalised_jsd(student, teacher, beta=small) / small
    reverse = generalised_jsd(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(forward, forward_kl(student, teacher), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reverse, reverse_kl(student, teacher), rtol=1e-4, atol=1e-4)


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    student, teacher = 30 * torch.randn(5, 6), 30 * torch.randn(5, 6)
    there, back = generalised_jsd(student, teacher, beta=0.5), generalised_jsd(teacher, student, beta=0.5)
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2) + 1e-6).all()


def test_taid_goes_from_no_gradient_to_forward_kl():
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    start = taid(student, teacher, t=0.0)
    start.sum().backward()
    assert start.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6
    torch.testing.assert_close(taid(student, teacher, t=1.0), forward_kl(student, teacher))


def test_taids_target_is_a_constant():
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    taid(student, teacher, t=0.4).sum().backward()
    target = (0.6 * student.detach() + 0.4 * teacher).softmax(-1)
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - target)


def test_the_gradient_of_forward_kl_is_student_minus_teacher():
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach())


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "taid"])  # whose target moves with its input
def test_gradients_are_those_of_the_values(name):
    student = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: DIVERGENCES[name](logits, teacher), student)


@every_divergence
def test_equal_distributions_have_zero_divergence_and_gradient(divergence):
    logits = torch.randn(4, 9)
    student = (logits + 3.0).requires_grad_()  # a shift of all logits is the same distribution
    value = divergence(student, logits)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@every_divergence
def test_tokens_that_neither_can_produce_do_not_matter(divergence):
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    blocked = torch.full((3, 2), -torch.inf)
    padded = torch.cat([student, blocked], -1).requires_grad_()
    value = divergence(padded, torch.cat([teacher, blocked], -1))
    torch.testing.assert_close(value, divergence(student, teacher))
    value.sum().backward()
    assert padded.grad.isfinite().all()


@every_divergence
def test_half_precision_logits_are_lifted(divergence):
    student, teacher = torch.randn(3, 6).bfloat16(), torch.randn(3, 6).bfloat16()
    value = divergence(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(student.float(), teacher.float()))


@every_divergence
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_padding_of_one_vocabulary_counts_on_neither_side(divergence, longer):
    student, teacher = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    padding = torch.full((3, 2), 9.0)
    padded = {"student": student, "teacher": teacher}
    padded[longer] = torch.cat([padded[longer], padding], -1)
    torch.testing.assert_close(divergence(padded["student"], padded["teacher"]), divergence(student, teacher))


def test_the_shared_vocabulary_is_the_shorter_one():
    shapes = [tuple(logits.shape) for logits in align_vocabularies(torch.zeros(2, 152), torch.zeros(2, 150))]
    assert shapes == [(2, 150), (2, 150)]
