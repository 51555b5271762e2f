import pytest
import torch

from dgpo.algorithms.reduce import masked_mean


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_mean_over_the_mask_by_hand():
    values, mask = torch.tensor([[1.0, 2.0], [4.0, 100.0]]), torch.tensor([[1, 1], [1, 0]])
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, mask, denominator=14).item() == pytest.approx(0.5)


@pytest.mark.parametrize("denominator", [None, 0, 5.0, torch.tensor(0)])
def test_an_empty_mask_gives_zero_with_zero_gradient(denominator):
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    mean = masked_mean(values, torch.zeros(3), denominator=denominator)
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad.tolist() == [0.0, 0.0, 0.0]


def test_masked_values_take_no_part_whatever_they_are():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_padding_does_not_change_the_mean():
    values, mask = torch.randn(3, 4), torch.tensor([[1, 0, 1, 1]] * 3)
    padded = torch.nn.functional.pad(values, (0, 5), value=7.0), torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(masked_mean(*padded), masked_mean(values, mask))


def test_micro_batches_with_the_denominator_of_all_add_up():
    values, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.4
    parts = [masked_mean(values[i : i + 1], mask[i : i + 1], denominator=mask.sum()) for i in range(4)]
    torch.testing.assert_close(sum(parts), masked_mean(values, mask))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"values are \(2, 3\) but the mask is \(3,\)"):
        masked_mean(torch.ones(2, 3), torch.ones(3))
