import math

import pytest
import torch

from dgpo.algorithms.distillation import DISTILLATION_LOSSES, kd, seqkd
from dgpo.algorithms.divergences import cross_entropy, forward_kl


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(9, 13, generator=generator).requires_grad_()
    teacher = torch.randn(9, 13, generator=generator)
    return student, teacher, torch.randint(13, (9,), generator=generator)


def test_kd_by_hand():
    # Student (3/4, 1/4), teacher (1/2, 1/2), target 0; r = 1/4; two tokens in the whole batch.
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    loss = kd(student, teacher, torch.tensor([0]), kl_ratio=0.25, denominator=2, chunk_size=4)
    kl = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert loss.item() == pytest.approx((0.75 * -math.log(3 / 4) + 0.25 * kl) / 2)


@pytest.mark.parametrize("kl_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_kd_mixes_both_terms_whatever_the_chunks(batch, kl_ratio, chunk_size):
    student, teacher, targets = batch
    kd(student, teacher, targets, kl_ratio=kl_ratio, denominator=9, chunk_size=chunk_size).backward()
    whole = student.detach().clone().requires_grad_()
    terms = (1 - kl_ratio) * cross_entropy(whole, targets) + kl_ratio * forward_kl(whole, teacher)
    terms.mean().backward()
    torch.testing.assert_close(student.grad, whole.grad)


def test_seqkd_is_the_mean_cross_entropy(batch):
    student, _, targets = batch
    loss = seqkd(student, None, targets, kl_ratio=1.0, denominator=9, chunk_size=2)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, targets))


@pytest.mark.parametrize("name", sorted(DISTILLATION_LOSSES))
def test_micro_batches_add_up_to_the_batch(batch, name):
    student, teacher, targets = batch
    options = {"kl_ratio": 0.5, "denominator": 9, "chunk_size": 2}
    whole = DISTILLATION_LOSSES[name](student, teacher, targets, **options)
    parts = [DISTILLATION_LOSSES[name](student[i], teacher[i], targets[i], **options) for i in (slice(4), slice(4, 9))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", sorted(DISTILLATION_LOSSES))
def test_no_policy_tokens_give_zero_and_still_a_gradient(batch, name):
    student, teacher, targets = batch
    loss = DISTILLATION_LOSSES[name](student[:0], teacher[:0], targets[:0], kl_ratio=0.5, denominator=0, chunk_size=2)
    loss.backward()
    assert loss.item() == 0.0
    assert (student.grad == 0).all()


def test_the_teacher_gets_no_gradient(batch):
    student, teacher, targets = batch
    teacher.requires_grad_()
    kd(student, teacher, targets, kl_ratio=1.0, denominator=9, chunk_size=3).backward()
    assert teacher.grad is None


def test_a_vocabulary_padded_further_is_cut_to_the_shared_part(batch):
    student, teacher, targets = batch
    options = {"kl_ratio": 1.0, "denominator": 9, "chunk_size": 3}
    padded = torch.cat([teacher, torch.full((9, 3), 20.0)], -1)
    torch.testing.assert_close(kd(student, padded, targets, **options), kd(student, teacher, targets, **options))


def test_kd_without_a_teacher_is_refused(batch):
    student, _, targets = batch
    with pytest.raises(ValueError, match=r"`kd` needs a teacher: set teacher.path, or choose distill.loss=seqkd"):
        kd(student, None, targets, kl_ratio=1.0, denominator=9, chunk_size=3)
