import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from dgpo.rl.updates import balanced_over_ranks, num_skipped, set_learning_rate


@pytest.mark.parametrize(
    ("grad_norms", "skipped"), [([1.0, math.nan, math.inf], 2.0), ([1.0, 2.0], 0.0), (math.nan, 1.0), (0.5, 0.0)]
)
def test_a_gradient_that_is_not_finite_is_a_skipped_update(grad_norms, skipped):
    assert num_skipped(grad_norms) == skipped


def warming_up(learning_rate):
    """SGD with a rate that grows over 4 steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, step / 4))


def rates(optimizer, scheduler, *, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def resumed(learning_rate, *, made_with):
    """Optimiser and schedule of a run with `learning_rate` that loaded a checkpoint of step 3."""
    optimizer, scheduler = warming_up(made_with)
    rates(optimizer, scheduler, steps=3)
    checkpoint = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = warming_up(learning_rate)
    optimizer.load_state_dict(checkpoint[0])
    scheduler.load_state_dict(checkpoint[1])
    set_learning_rate(optimizer, scheduler, learning_rate)
    return optimizer, scheduler


def test_a_checkpoint_of_the_same_run_goes_on_exactly():
    straight = rates(*warming_up(0.4), steps=6)
    assert rates(*resumed(0.4, made_with=0.4), steps=3) == straight[3:]


def test_a_resumed_run_has_the_learning_rate_of_its_configuration():
    assert rates(*resumed(0.2, made_with=0.4), steps=3) == pytest.approx([0.15, 0.2, 0.2])


def test_one_rank_gets_the_batch_as_it_is():
    assert balanced_over_ranks([5, 1, 9, 2], num_ranks=1, mini_batch_size=2) == [[0, 1, 2, 3]]


def test_ranks_share_every_update_evenly_and_its_episodes_are_the_same_on_any_number_of_them():
    """First update 9, 1, 8, 2: (9, 1) and (8, 2) weigh the same; second 3, 3, 7, 1: (7, 1) and (3, 3) are nearest."""
    lengths = [9, 1, 8, 2, 3, 3, 7, 1]
    shares = balanced_over_ranks(lengths, num_ranks=2, mini_batch_size=4)
    for update, sums in ((slice(0, 2), [10, 10]), (slice(2, 4), [6, 8])):
        assert sorted(sum(lengths[index] for index in share[update]) for share in shares) == sums
    assert sorted(index for share in shares for index in share[:2]) == [0, 1, 2, 3]
    assert sorted(index for share in shares for index in share[2:]) == [4, 5, 6, 7]
