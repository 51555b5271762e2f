import pytest
import torch

from dgpo.rl.metrics import choose_monitored, episode_metrics, teacher_kl_metrics


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


def test_only_correct_episodes_are_monitored():
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    chosen = choose_monitored(correct, already=correct < 0.5, num_monitored=2, multiple=1)
    assert chosen.tolist() == [False, True, True, False, False]


def test_the_total_is_filled_to_a_multiple_of_the_ranks():
    correct = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    already = correct < 0.5
    chosen = choose_monitored(correct, already=already, num_monitored=1, multiple=4)
    assert int((chosen | already).sum()) == 4
    assert not (chosen & already).any()


def test_episode_metrics_are_means_and_missing_counters_are_zero():
    metrics = episode_metrics([{"em": 1.0, "num_cut_passages": 2.0}, {"em": 0.0}])
    assert metrics == {"episode/em": 0.5, "episode/num_cut_passages": 1.0}
