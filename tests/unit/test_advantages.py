"""Advantages by hand and against veRL, and who takes part in a statistic."""

import pytest
import torch

from dgpo.algorithms.advantages import generalised_advantages, group_relative_advantages
from dgpo.algorithms.selective_kl import subtract_teacher_kl


def one_reward_each(returns, length=3):
    """[B, length] rewards with each episode's return on its last token, and a full mask."""
    rewards = torch.zeros(len(returns), length)
    rewards[:, -1] = torch.tensor(returns)
    return rewards, torch.ones_like(rewards)


def test_a_group_of_three_by_hand():
    rewards, mask = one_reward_each([1.0, 0.0, 0.5])
    advantages = group_relative_advantages(rewards, response_mask=mask, groups=["q"] * 3)
    # mean .5, deviation .5 with two degrees of freedom
    torch.testing.assert_close(advantages[:, 0], torch.tensor([1.0, -1.0, 0.0]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(advantages[:, 0], advantages[:, 2])


def test_groups_do_not_mix():
    rewards, mask = one_reward_each([1.0, 5.0, 0.0, 7.0])
    advantages = group_relative_advantages(rewards, response_mask=mask, groups=["a", "b", "a", "b"])
    assert advantages[0, 0] > 0 > advantages[2, 0]
    torch.testing.assert_close(advantages[0], advantages[3])


def test_equal_rewards_give_nothing():
    rewards, mask = one_reward_each([1.0, 1.0])
    assert group_relative_advantages(rewards, response_mask=mask, groups=[0, 0]).eq(0).all()


def test_environment_tokens_get_nothing():
    rewards, mask = one_reward_each([1.0, 0.0])
    mask[:, 1] = 0
    assert group_relative_advantages(rewards, response_mask=mask, groups=[0, 0])[:, 1].eq(0).all()


def test_an_episode_whose_search_failed_is_in_no_statistic():
    rewards, mask = one_reward_each([1.0, 0.0, 0.0])
    mask[2] = 0
    with_failure = group_relative_advantages(rewards, response_mask=mask, groups=["q"] * 3)
    alone = group_relative_advantages(rewards[:2], response_mask=mask[:2], groups=["q"] * 2)
    torch.testing.assert_close(with_failure[:2], alone)
    assert with_failure[2].eq(0).all()


def test_an_episode_left_alone_in_its_group_gets_nothing():
    rewards, mask = one_reward_each([1.0, 0.0])
    mask[1] = 0
    assert group_relative_advantages(rewards, response_mask=mask, groups=["q", "q"]).eq(0).all()


def test_it_equals_verls_where_every_episode_counts():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, 5, generator=generator)
    mask = torch.ones(12, 5)
    groups = [f"q{index // 4}" for index in range(12)]
    theirs, _ = core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, groups)
    torch.testing.assert_close(group_relative_advantages(rewards, response_mask=mask, groups=groups), theirs)


def test_a_missing_group_name_is_refused():
    rewards, mask = one_reward_each([1.0, 0.0])
    with pytest.raises(ValueError, match="1 group names for 2 episodes"):
        group_relative_advantages(rewards, response_mask=mask, groups=["q"])


def test_the_token_form_moves_only_gated_policy_tokens_by_their_own_log_ratio():
    advantages = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    result = subtract_teacher_kl(
        advantages,
        student_log_probs=torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]),
        teacher_log_probs=torch.tensor([[-3.0, -1.5, -9.0], [-9.0, -9.0, -9.0]]),
        response_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
        gate=torch.tensor([1.0, 0.0]),
        kl_coef=0.5,
    )
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.75, 1.0], [2.0, 2.0, 2.0]]))


def test_generalised_advantages_by_hand():
    """Discount 1/2; the token in the middle is the environment's: the first looks past it."""
    rewards, mask = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[1, 0, 1]])
    values = torch.tensor([[0.5, 7.0, 0.5]])
    advantages, returns = generalised_advantages(rewards, response_mask=mask, values=values, gamma=0.5, lam=1.0)
    # Last: 1 - .5. First: 0 + .5 * .5 - .5 + .5 * .5 = 0. Whitened: mean .25, variance .125 with one degree of freedom.
    torch.testing.assert_close(advantages[:, [0, 2]], torch.tensor([[-0.25, 0.25]]) / 0.125**0.5)
    torch.testing.assert_close(returns[:, [0, 2]], torch.tensor([[0.5, 1.0]]))


def test_generalised_advantages_are_verls_to_the_last_bit():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    for seed, (gamma, lam) in enumerate([(1.0, 1.0), (0.99, 0.95)]):
        generator = torch.Generator().manual_seed(seed)
        rewards, values = torch.randn(2, 16, 37, generator=generator)
        mask = (torch.rand(16, 37, generator=generator) > 0.4).long()
        theirs = core_algos.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        ours = generalised_advantages(rewards, response_mask=mask, values=values, gamma=gamma, lam=lam)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_batch_without_policy_tokens_has_no_advantages():
    nothing = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="0 policy tokens"):
        generalised_advantages(nothing, response_mask=nothing, values=nothing, gamma=1.0, lam=1.0)
