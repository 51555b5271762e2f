import math

import pytest
import torch

from dgpo.algorithms import divergences
from dgpo.algorithms.distillation import DISTILLATION_LOSSES, LossSettings

SETTINGS = LossSettings(kl_ratio=0.75, skew=0.1, jsd_beta=0.3, taid_t=0.6)
WITH_TEACHER = sorted(name for name, loss in DISTILLATION_LOSSES.items() if loss.needs_teacher)


def settings(**changes):
    return LossSettings(**(vars(SETTINGS) | changes))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(9, 13, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(9, 13, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(13, (9,), generator=generator)


def test_kd_by_hand():
    # Student (3/4, 1/4), teacher (1/2, 1/2), target 0; r = 1/4.
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    value = DISTILLATION_LOSSES["kd"].token_loss(settings(kl_ratio=0.25))(student, teacher, torch.tensor([0]))
    kl = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert value.item() == pytest.approx(0.75 * -math.log(3 / 4) + 0.25 * kl)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("kd", divergences.forward_kl),
        ("forward_kl", divergences.forward_kl),
        ("reverse_kl", divergences.reverse_kl),
        ("jsd", lambda student, teacher: divergences.generalised_jsd(student, teacher, beta=0.3)),
        ("distillm", lambda student, teacher: divergences.skew_forward_kl(student, teacher, skew=0.1)),
        ("skew_kl", lambda student, teacher: divergences.skew_forward_kl(student, teacher, skew=0.1)),
        ("skew_reverse_kl", lambda student, teacher: divergences.skew_reverse_kl(student, teacher, skew=0.1)),
        ("taid", lambda student, teacher: divergences.taid(student, teacher, t=0.6)),
    ],
)
def test_each_name_is_its_divergence_mixed_with_the_cross_entropy(batch, name, divergence):
    student, teacher, targets = batch
    ratio = SETTINGS.kl_ratio
    expected = (1 - ratio) * divergences.cross_entropy(student, targets) + ratio * divergence(student, teacher)
    torch.testing.assert_close(DISTILLATION_LOSSES[name].token_loss(SETTINGS)(student, teacher, targets), expected)


def test_every_loss_with_a_teacher_is_checked_above():
    checked = {"kd", "forward_kl", "reverse_kl", "jsd", "distillm", "skew_kl", "skew_reverse_kl", "taid"}
    assert set(WITH_TEACHER) == checked


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_ratio_of_one_leaves_the_targets_out(batch, name):
    student, teacher, targets = batch
    loss = DISTILLATION_LOSSES[name].token_loss(settings(kl_ratio=1.0))
    torch.testing.assert_close(loss(student, teacher, targets), loss(student, teacher, (targets + 1) % 13))


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_ratio_of_zero_is_the_cross_entropy(batch, name):
    student, teacher, targets = batch
    value = DISTILLATION_LOSSES[name].token_loss(settings(kl_ratio=0.0))(student, teacher, targets)
    torch.testing.assert_close(value, divergences.cross_entropy(student, targets))


def test_seqkd_is_the_cross_entropy_whatever_the_settings(batch):
    student, _, targets = batch
    assert not DISTILLATION_LOSSES["seqkd"].needs_teacher
    value = DISTILLATION_LOSSES["seqkd"].token_loss(settings(kl_ratio=1.0))(student, None, targets)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(student, targets, reduction="none"))


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_gets_no_gradient(batch, name):
    student, teacher, targets = batch
    teacher.requires_grad_()
    DISTILLATION_LOSSES[name].token_loss(SETTINGS)(student, teacher, targets).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_missing_teacher_is_refused(batch, name):
    student, _, targets = batch
    with pytest.raises(ValueError, match=r"needs a teacher: set teacher.path, or choose distill.loss=seqkd"):
        DISTILLATION_LOSSES[name].token_loss(SETTINGS)(student, None, targets)


@pytest.mark.parametrize("field", ["kl_ratio", "skew", "jsd_beta", "taid_t"])
def test_settings_outside_their_range_are_refused(field):
    with pytest.raises(ValueError, match=rf"{field} is 1.5: expected a share between 0 and 1"):
        settings(**{field: 1.5})
