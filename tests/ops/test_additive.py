import itertools

import pytest
import torch

from leanrec.ops.additive import NormalSums, beam_search, improve_codes, residual_codebooks, sum_words, update_codebooks


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def squared_error(points, codes, codebooks, weights=1.0):
    return float(((points - sum_words(codes, codebooks)).square().sum(1) * weights).sum())


def test_sum_words_is_the_sum_of_one_word_per_level():
    codebooks, codes = torch.randn(3, 5, 4, generator=seeded(0)), torch.tensor([[0, 4, 2], [1, 1, 1]])
    expected = torch.stack([codebooks[0, 0] + codebooks[1, 4] + codebooks[2, 2], codebooks[:, 1].sum(0)])
    torch.testing.assert_close(sum_words(codes, codebooks), expected)


def test_a_beam_of_all_beginnings_finds_the_best_of_all_codes():
    codebooks, points = torch.randn(3, 6, 4, generator=seeded(1)), torch.randn(40, 4, generator=seeded(2))
    every = torch.tensor(list(itertools.product(range(6), repeat=3)))
    best = every[torch.cdist(points, sum_words(every, codebooks)).argmin(1)]
    found = beam_search(points, codebooks, beam_size=36)
    assert squared_error(points, found, codebooks) == pytest.approx(squared_error(points, best, codebooks), rel=1e-5)


def test_a_beam_of_one_is_greedy():
    codebooks, points = torch.randn(2, 8, 4, generator=seeded(3)), torch.randn(100, 4, generator=seeded(4))
    first = torch.cdist(points, codebooks[0]).argmin(1)
    second = torch.cdist(points - codebooks[0, first], codebooks[1]).argmin(1)
    assert torch.equal(beam_search(points, codebooks, beam_size=1), torch.stack([first, second], dim=1))


def test_improved_codes_are_worse_for_no_point():
    codebooks, points = torch.randn(4, 8, 6, generator=seeded(5)), torch.randn(500, 6, generator=seeded(6))
    codes = beam_search(points, codebooks, beam_size=2)
    improved = improve_codes(points, codes, codebooks, beam_size=8)
    before, after = ((points - sum_words(some, codebooks)).square().sum(1) for some in (codes, improved))
    assert (after <= before + 1e-5).all() and after.sum() < before.sum()


def test_updates_come_to_the_weighted_least_squares_solution():
    points, weights = torch.randn(300, 5, generator=seeded(7)), torch.rand(300, generator=seeded(8))
    codebooks, codes = residual_codebooks(points, 3, 4, weights=weights, generator=seeded(9))
    design = torch.cat([torch.nn.functional.one_hot(codes[:, level], 4) for level in range(3)], dim=1).float()
    root = weights.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(design * root, points * root, driver="gelsd").solution.view(3, 4, 5)
    once = update_codebooks(points, codes, codebooks, weights=weights)
    many = once
    for _ in range(100):
        many = update_codebooks(points, codes, many, weights=weights)
    least = squared_error(points, codes, solution, weights)
    assert squared_error(points, codes, once, weights) < squared_error(points, codes, codebooks, weights)
    assert squared_error(points, codes, many, weights) == pytest.approx(least, rel=1e-3)


def test_sums_of_pieces_give_the_update_of_all_points():
    points, weights = torch.randn(500, 5, generator=seeded(10)), torch.rand(500, generator=seeded(11))
    codebooks, codes = residual_codebooks(points, 3, 6, weights=weights, generator=seeded(12))
    sums = NormalSums.empty(codebooks)
    for some in torch.arange(500).split(120):
        sums.add(points[some], codes[some], weights[some])
    expected = update_codebooks(points, codes, codebooks, weights=weights)
    torch.testing.assert_close(sums.update(codebooks), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected, codebooks)
