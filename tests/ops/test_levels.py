from itertools import product

import pytest
import torch

from leanrec.ops.levels import Gains, even_borders


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def falling_errors(num_rows, num_levels, seed):
    """Errors before the first level and after each: a level takes a share of what is there, of some rows more than of others."""
    shares = torch.rand(num_rows, num_levels, generator=seeded(seed)) * 0.6 + 0.2
    return torch.cat([torch.ones(num_rows, 1), shares.cumprod(1)], dim=1)


def gains_of(errors, weights):
    return Gains.measure(torch.arange(len(errors)), errors, weights, len(errors))


def error_left(errors, weights, borders):
    """Each row keeps the error after its own number of levels."""
    lengths = [sum(rank < border for border in borders) for rank in range(len(errors))]
    return sum(float(weights[rank] * errors[rank, length]) for rank, length in enumerate(lengths))


@pytest.mark.parametrize("seed", range(5))
def test_borders_at_a_price_are_the_best_of_all_monotone_ones_where_weights_fall(seed):
    errors, weights = falling_errors(6, 2, seed), 3.0 ** -torch.arange(6)
    price = 0.05
    best = min(
        (borders for borders in product(range(7), repeat=2) if borders[0] >= borders[1]),
        key=lambda borders: error_left(errors, weights, borders) + price * sum(borders),
    )
    found = gains_of(errors, weights).borders(price)
    assert error_left(errors, weights, found) + price * sum(found) == pytest.approx(error_left(errors, weights, best) + price * sum(best))


def test_all_codes_are_spent_and_popular_rows_get_more_of_them():
    errors, weights = falling_errors(100, 4, 0), 1 / torch.arange(1, 101)
    for num_codes in (1, 7, 100, 399, 400):
        borders = gains_of(errors, weights).spend(num_codes, num_levels=4)
        assert sum(borders) == num_codes
        assert borders == sorted(borders, reverse=True) and borders[0] <= 100


@pytest.mark.parametrize("num_codes", [2, 5, 9])
def test_a_number_of_codes_is_spent_about_as_well_as_can_be(num_codes):
    errors, weights = falling_errors(8, 2, 3), 1.5 ** -torch.arange(8)
    fitting = (borders for borders in product(range(9), repeat=2) if borders[0] >= borders[1] and sum(borders) <= num_codes)
    best = min(error_left(errors, weights, borders) for borders in fitting)
    assert error_left(errors, weights, gains_of(errors, weights).spend(num_codes, num_levels=2)) <= 1.05 * best


def test_the_error_left_is_that_of_the_rows():
    errors, weights = falling_errors(50, 3, 1), torch.rand(50, generator=seeded(2))
    for borders in ([50, 20, 3], [10, 0, 0], [0, 0, 0]):
        assert gains_of(errors, weights).left(borders) == pytest.approx(error_left(errors, weights, borders))


def test_rows_between_sampled_ones_go_with_the_one_before():
    gains = Gains.measure(torch.tensor([0, 10, 40]), torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1]]), torch.tensor([1.0, 0.5, 0.01]), 100)
    assert gains.ends.tolist() == [10, 40, 100]
    assert gains.borders(0.01) == [40]  # 30 codes save .45, the last 60 only .009


def test_even_borders_fill_the_first_level_first():
    assert even_borders(10, 3, 25) == [10, 10, 5]
    assert even_borders(10, 3, 4) == [4, 0, 0]
