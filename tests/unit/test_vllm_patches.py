"""Sampling by one number per sequence, and which linear layers stay plain."""

import pytest
import torch

from dgpo.engines.vllm_patches import MIN_PACKED_ELEMENTS, _dispatch, draw

PROBABILITIES = torch.tensor([0.1, 0.0, 0.6, 0.3])


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.0999, 0), (0.1001, 2), (0.6999, 2), (0.7001, 3), (1.0 - 2**-53, 3), (1.0, 3)]
)
def test_the_token_is_the_first_whose_cumulative_probability_exceeds_the_number(monkeypatch, number, token):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, number, dtype=torch.float64))
    assert draw(PROBABILITIES[None], {}).tolist() == [token]


def test_frequencies_are_the_probabilities():
    torch.manual_seed(0)
    count = 100_000
    seen = torch.bincount(draw(PROBABILITIES.repeat(count, 1), {}), minlength=4) / count
    standard_error = (PROBABILITIES * (1 - PROBABILITIES) / count).sqrt()
    assert ((seen - PROBABILITIES).abs() <= 4 * standard_error).all()  # exactly 0 where nothing may be drawn


def test_a_seeded_row_draws_the_same_in_any_company():
    wide = torch.softmax(torch.randn(5, 50, generator=generator(3)), dim=-1)
    alone = [int(draw(wide[row : row + 1], {0: generator(row)})) for row in range(5)]
    together = draw(wide, {row: generator(row) for row in range(5)}).tolist()
    half = draw(wide, {2: generator(2), 4: generator(4)}).tolist()
    assert alone == together
    assert (half[2], half[4]) == (alone[2], alone[4])


def test_a_generator_goes_on_from_draw_to_draw():
    own = generator(1)
    drawn = [int(draw(torch.ones(1, 1000), {0: own})) for _ in range(3)]
    numbers = torch.rand(3, dtype=torch.float64, generator=generator(1))
    assert drawn == (numbers * 1000).long().tolist()


def test_weights_that_do_not_sum_to_one_are_probabilities_up_to_a_factor():
    assert draw(7 * PROBABILITIES[None], {0: generator(5)}) == draw(PROBABILITIES[None], {0: generator(5)})


SMALL, LARGE = torch.nn.Linear(64, 320), torch.nn.Linear(512, MIN_PACKED_ELEMENTS // 512)


@pytest.mark.parametrize(
    ("layer", "packs", "packed"), [(SMALL, True, False), (LARGE, True, True), (LARGE, False, False)]
)
def test_only_large_layers_of_weights_that_stay_are_packed(layer, packs, packed):
    calls = []
    _dispatch(layer, True, pack=(lambda *arguments: calls.append(arguments)) if packs else None)
    assert calls == ([(layer, True)] if packed else [])
    assert (getattr(layer, "cpu_linear", None) is torch.nn.functional.linear) is not packed
    layer.__dict__.pop("cpu_linear", None)
