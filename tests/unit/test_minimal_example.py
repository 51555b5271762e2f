"""examples/minimal_dgpo.py makes the update that veRL's own functions and our worker's loss make."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("verl")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import minimal_dgpo
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return minimal_dgpo


def model(seed, *, width=16):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def setting(example):
    """A student, a critic that began elsewhere, a teacher, and six episodes with observations in them."""
    student, teacher = model(0), model(1, width=24)
    critic = example.Critic(model(2))
    torch.manual_seed(3)
    torch.nn.init.normal_(critic.head.weight)
    ids = torch.randint(0, 40, (6, 15))
    mask = torch.zeros(6, 14)
    for row, (begin, end) in enumerate([(3, 12), (4, 14), (2, 9), (5, 13), (3, 11), (6, 14)]):
        mask[row, begin:end] = 1
        mask[row, begin + 2 : begin + 4] = 0  # what a search found
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    return student, teacher, critic, example.Batch(ids, mask), correct


def verl_losses(example, setting, *, form):
    """The same step by veRL's functions, from whole logits and a plain divergence."""
    from verl.trainer.ppo.core_algos import (
        compute_gae_advantage_return,
        compute_policy_loss_vanilla,
        compute_value_loss,
    )
    from verl.workers.config import ActorConfig

    from dgpo.algorithms.divergences import reverse_kl

    student, teacher, critic, batch, correct = setting
    config = ActorConfig(strategy="fsdp2", rollout_n=1, clip_ratio=0.2, ppo_mini_batch_size=8, use_dynamic_bsz=True)
    logits, teacher_logits = student(batch.ids).logits[:, :-1], teacher(batch.ids).logits[:, :-1].detach()
    log_probs = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    teacher_log_probs = teacher_logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    values = critic(batch.ids)[:, :-1]
    failed = 1 - correct
    rewards = torch.zeros_like(batch.mask)
    for row in range(len(correct)):
        rewards[row, int(batch.mask[row].nonzero().max())] = correct[row]
    if form == "reward":
        rewards -= 0.001 * failed[:, None] * batch.mask * (log_probs - teacher_log_probs).detach()
    advantages, returns = compute_gae_advantage_return(
        rewards, values.detach() * batch.mask, batch.mask, torch.tensor(1.0), torch.tensor(1.0)
    )
    actor, _ = compute_policy_loss_vanilla(log_probs.detach(), log_probs, advantages, batch.mask, config=config)
    if form == "exact":
        kl = reverse_kl(logits.flatten(0, 1), teacher_logits.flatten(0, 1)).view_as(batch.mask)
        actor = actor + (kl * batch.mask * failed[:, None]).sum() / batch.mask.sum()
    value, _ = compute_value_loss(values, returns, values.detach(), batch.mask, cliprange_value=0.5)
    return actor, value


@pytest.mark.parametrize("form", ["exact", "reward"])
def test_losses_and_first_gradients_are_those_of_verl(example, setting, form):
    student, teacher, critic, batch, correct = setting
    (ours,) = example.losses(student, critic, teacher, batch, correct, form=form)
    theirs = verl_losses(example, setting, form=form)
    for loss, expected, trained in zip(ours, theirs, (student, critic), strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        parameters = [p for p in trained.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for gradient, wanted in zip(
            gradients, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True
        ):
            assert (gradient is None) == (wanted is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_the_reward_stands_on_the_last_token_of_the_policy(example, setting):
    *_, batch, correct = setting
    scores = batch.scores(correct)
    assert scores.sum() == correct.sum()
    assert scores[0, 11] == 1
    assert scores[3, 12] == 1


def test_the_example_fits_on_its_page():
    assert len((ROOT / "examples" / "minimal_dgpo.py").read_text().splitlines()) <= 300
