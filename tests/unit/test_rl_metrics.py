import pytest
import torch

from dgpo.rl.metrics import choose_monitored, episode_metrics, log_prob_disagreement, sampled_kl, teacher_kl_metrics


def test_kl_is_reported_apart_for_failed_correct_and_all_episodes():
    log_ratio = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    metrics = teacher_kl_metrics(
        log_ratio,
        response_mask=mask,
        correct=torch.tensor([0.0, 1.0, 0.0]),
        scored=torch.tensor([True, True, False]),
    )
    assert metrics == {
        "teacher/kl_failed": pytest.approx(1.5),
        "teacher/kl_correct": pytest.approx(4.0),
        "teacher/kl_all": pytest.approx(7 / 3),
    }


def test_a_group_without_scored_tokens_is_left_out():
    metrics = teacher_kl_metrics(
        torch.ones(1, 2), response_mask=torch.ones(1, 2), correct=torch.zeros(1), scored=torch.tensor([True])
    )
    assert set(metrics) == {"teacher/kl_failed", "teacher/kl_all"}


def test_the_first_of_each_kind_are_monitored_that_the_teacher_does_not_score_anyway():
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    nothing = torch.zeros(6, dtype=torch.bool)
    chosen = choose_monitored(correct, already=correct < 0.5, num_monitored=2, multiple=1)
    assert chosen.tolist() == [False, True, True, False, False, False]
    chosen = choose_monitored(correct, already=nothing, num_monitored=2, multiple=1)
    assert chosen.tolist() == [True, True, True, True, False, False]


def test_the_total_is_filled_to_a_multiple_of_the_ranks():
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    already = correct < 0.5
    chosen = choose_monitored(correct, already=already, num_monitored=1, multiple=4)
    assert int((chosen | already).sum()) == 4
    assert not (chosen & already).any()


def test_episode_metrics_are_means_and_missing_counters_are_zero():
    metrics = episode_metrics([{"em": 1.0, "num_cut_passages": 2.0}, {"em": 0.0}], max_response_tokens=10)
    assert metrics == {"episode/em": 0.5, "episode/num_cut_passages": 1.0, "episode/response_fill": 0.0}


def test_shares_are_of_all_tokens_and_turns_of_the_step():
    """Not means of each episode's share: a long loop weighs more than a short sound episode."""
    looping = {"num_repeated_tokens": 90.0, "num_policy_tokens": 100.0, "num_response_tokens": 100.0}
    sound = {"num_repeated_tokens": 0.0, "num_policy_tokens": 20.0, "num_response_tokens": 60.0}
    turns = [
        {"num_turns": 5.0, "num_truncated_turns": 5.0, "num_invalid_actions": 4.0},
        {"num_turns": 3.0, "num_truncated_turns": 0.0, "num_invalid_actions": 0.0},
    ]
    metrics = episode_metrics([looping | turns[0], sound | turns[1]], max_response_tokens=400)
    assert metrics["episode/repeated_token_share"] == 90 / 120
    assert metrics["episode/truncated_turn_share"] == 5 / 8
    assert metrics["episode/invalid_action_rate"] == 4 / 8
    assert metrics["episode/response_fill"] == 80 / 400


def test_a_sampled_kl_is_the_mean_over_policy_tokens():
    log_ratio = torch.tensor([[1.0, -0.5, 99.0], [2.5, 99.0, 99.0]])
    assert sampled_kl(log_ratio, torch.tensor([[1, 1, 0], [1, 0, 0]])) == pytest.approx(1.0)


def test_engine_and_trainer_are_compared_on_policy_tokens_by_the_largest_and_the_mean_difference():
    rollout, trainer = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.25, -2.0, -1.0]])
    assert log_prob_disagreement(rollout, trainer, torch.tensor([[1.0, 1.0, 0.0]])) == {
        "rollout/log_prob_diff_max": 0.25,
        "rollout/log_prob_diff_mean": 0.125,
    }
