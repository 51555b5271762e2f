import math

import pytest
import torch
import torch.nn.functional as F

from dgpo.algorithms.distillation import DISTILLATION_LOSSES, LossSettings
from dgpo.algorithms.fused_linear import fused_linear_loss

SETTINGS = LossSettings(kl_ratio=0.7, skew=0.1, jsd_beta=0.3, taid_t=0.6)
NUM_TOKENS, VOCABULARY, TEACHER_VOCABULARY = 21, 11, 13
every_loss = pytest.mark.parametrize("name", sorted(DISTILLATION_LOSSES))
GRADIENTS = ("student_hidden", "student_head", "student_bias")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_hidden": randn(NUM_TOKENS, 5).requires_grad_(),
        "student_head": randn(VOCABULARY, 5).requires_grad_(),
        "student_bias": randn(VOCABULARY).requires_grad_(),
        "teacher_hidden": randn(NUM_TOKENS, 4),
        "teacher_head": randn(TEACHER_VOCABULARY, 4),
        "targets": torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator),
    }


def without_teacher(batch):
    return batch | {"teacher_hidden": None, "teacher_head": None}


def token_loss(name):
    return DISTILLATION_LOSSES[name].token_loss(SETTINGS)


def plain(loss, batch, denominator):
    """The same from whole logits."""
    student = F.linear(batch["student_hidden"], batch["student_head"], batch["student_bias"])
    teacher = F.linear(batch["teacher_hidden"], batch["teacher_head"])
    return loss(student, teacher, batch["targets"]).sum() / denominator


def gradients(loss, batch):
    return torch.autograd.grad(loss, [batch[name] for name in GRADIENTS])


def rows(batch, part):
    return batch | {name: batch[name][part] for name in ("student_hidden", "teacher_hidden", "targets")}


def test_two_tokens_by_hand():
    # Student (3/4, 1/4), teacher (1/2, 1/2), twice; the states are 1 and the heads hold the logits.
    batch = {
        "student_hidden": torch.ones(2, 1).requires_grad_(),
        "student_head": torch.tensor([[math.log(3.0)], [0.0]]).requires_grad_(),
        "teacher_hidden": torch.ones(2, 1),
        "teacher_head": torch.zeros(2, 1),
        "targets": torch.tensor([0, 1]),
    }
    kd = DISTILLATION_LOSSES["kd"].token_loss(LossSettings(kl_ratio=1.0, skew=0.1, jsd_beta=0.5, taid_t=1.0))
    loss = fused_linear_loss(kd, **batch, denominator=4, chunk_size=1)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 4)
    # d KL / d logits = p - q = (1/4, -1/4) per token; the head gets it from both, each state through the head.
    torch.testing.assert_close(batch["student_head"].grad, torch.tensor([[0.5], [-0.5]]) / 4)
    torch.testing.assert_close(batch["student_hidden"].grad, torch.full((2, 1), math.log(3.0) / 4 / 4))


@every_loss
@pytest.mark.parametrize("chunk_size", [1, 4, 10, 100])
def test_chunks_give_the_value_and_gradients_of_whole_logits(batch, name, chunk_size):
    loss = fused_linear_loss(token_loss(name), **batch, denominator=30, chunk_size=chunk_size)
    expected = plain(token_loss(name), batch, 30)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(loss, batch), gradients(expected, batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in sorted(DISTILLATION_LOSSES) if name != "taid"])
def test_gradients_are_those_of_the_value(batch, name):
    batch = rows(batch, slice(10))

    def loss(hidden, head, bias):
        student = {"student_hidden": hidden, "student_head": head, "student_bias": bias}
        return fused_linear_loss(token_loss(name), **(batch | student), denominator=7.0, chunk_size=4)

    # The backward pass scales in place, and gradcheck runs it twice: it gets copies.
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert torch.autograd.gradcheck(loss, [batch[name] for name in GRADIENTS], fast_mode=True)


@every_loss
def test_micro_batches_with_the_denominator_of_all_add_up(batch, name):
    whole = fused_linear_loss(token_loss(name), **batch, denominator=NUM_TOKENS, chunk_size=4)
    parts = [
        fused_linear_loss(token_loss(name), **rows(batch, part), denominator=NUM_TOKENS, chunk_size=4)
        for part in (slice(5), slice(5, 6), slice(6, None))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(gradients(sum(parts), batch), gradients(whole, batch))


def test_padding_that_is_cut_out_before_changes_nothing(batch):
    # Tokens [B, T] of two episodes, the second one shorter: the mask picks the states, as the trainer does.
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    counted = int(mask.sum())
    short = rows(batch, slice(counted))
    padded = torch.full((2, 4, 5), torch.nan, dtype=torch.float64)
    padded[mask] = short["student_hidden"].detach()
    padded.requires_grad_()
    loss = fused_linear_loss(
        token_loss("kd"), **(short | {"student_hidden": padded[mask]}), denominator=counted, chunk_size=4
    )
    expected = fused_linear_loss(token_loss("kd"), **short, denominator=counted, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (padded.grad[~mask] == 0).all()
    assert (padded.grad[mask] != 0).any(-1).all()


@every_loss
def test_no_tokens_give_zero_and_zero_gradients(batch, name):
    loss = fused_linear_loss(token_loss(name), **rows(batch, slice(0)), denominator=0, chunk_size=4)
    assert loss.item() == 0.0
    loss.backward()
    assert (batch["student_head"].grad == 0).all()
    assert (batch["student_bias"].grad == 0).all()
    assert (batch["student_hidden"].grad == 0).all()


def test_a_loss_without_a_teacher_needs_none(batch):
    loss = fused_linear_loss(token_loss("seqkd"), **without_teacher(batch), denominator=NUM_TOKENS, chunk_size=4)
    logits = F.linear(batch["student_hidden"], batch["student_head"], batch["student_bias"])
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["targets"]))


def test_the_upstream_gradient_scales_all(batch):
    scaled = gradients(3.0 * fused_linear_loss(token_loss("kd"), **batch, denominator=5, chunk_size=4), batch)
    expected = gradients(3.0 * plain(token_loss("kd"), batch, 5), batch)
    torch.testing.assert_close(scaled, expected)


def test_a_second_backward_pass_is_refused(batch):
    loss = fused_linear_loss(token_loss("kd"), **batch, denominator=5, chunk_size=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluation_computes_no_gradients(batch):
    calls = []

    def watched(student, teacher, targets):
        calls.append(student.requires_grad)
        return token_loss("kd")(student, teacher, targets)

    with torch.no_grad():
        loss = fused_linear_loss(watched, **batch, denominator=5, chunk_size=4)
    assert not loss.requires_grad
    assert not any(calls)
    torch.testing.assert_close(loss, plain(token_loss("kd"), batch, 5).detach())


@pytest.mark.parametrize("trained", GRADIENTS)
def test_what_is_frozen_gets_no_gradient(batch, trained):
    expected = dict(zip(GRADIENTS, gradients(plain(token_loss("kd"), batch, 5), batch), strict=True))
    frozen = {name: batch[name].detach().requires_grad_(name == trained) for name in GRADIENTS}
    fused_linear_loss(token_loss("kd"), **(batch | frozen), denominator=5, chunk_size=4).backward()
    torch.testing.assert_close(frozen[trained].grad, expected[trained])
    assert all(frozen[name].grad is None for name in GRADIENTS if name != trained)


def test_the_teacher_gets_no_gradient(batch):
    teacher = {name: batch[name].requires_grad_() for name in ("teacher_hidden", "teacher_head")}
    fused_linear_loss(token_loss("kd"), **batch, denominator=5, chunk_size=4).backward()
    assert all(tensor.grad is None for tensor in teacher.values())


def test_autocast_multiplies_in_its_type_and_sums_in_the_weights(batch, monkeypatch):
    monkeypatch.setattr("dgpo.algorithms.fused_linear._ROWS_AT_ONCE", 3)
    single = {
        name: value.detach().float().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for name, value in batch.items()
    }
    seen = set()

    def watched(student, teacher, targets):
        seen.update((student.dtype, teacher.dtype))
        return token_loss("kd")(student, teacher, targets)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_loss(watched, **single, denominator=5, chunk_size=4)
        expected = plain(token_loss("kd"), single, 5)
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(gradients(loss, single), gradients(expected, single), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_head": None}, "only one was given"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "21 student states but 3 targets"),
        ({"teacher_hidden": torch.zeros(4, 4)}, "21 student states but 4 of the teacher"),
    ],
)
def test_tensors_of_different_tokens_are_refused(batch, change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(token_loss("kd"), **(batch | change), denominator=5, chunk_size=4)
