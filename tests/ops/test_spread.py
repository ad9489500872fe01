import math

import numpy as np
import pytest
import torch

from leanrec.ops.kmeans import kmeans, nearest
from leanrec.ops.spread import Covariance, Spread, coded_variance, mean_and_covariance, moments, variance


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows():
    return torch.randn(300, 6, generator=seeded(0)) @ torch.randn(6, 6, generator=seeded(1)) + 5


@pytest.fixture
def counts():
    return torch.randint(0, 50, (300,), generator=seeded(2))


def test_moments_and_covariance_are_numpys(rows, counts):
    mean, covariance = mean_and_covariance(rows.split(77), counts)
    np.testing.assert_allclose(mean, np.average(rows.double(), axis=0, weights=counts))
    np.testing.assert_allclose(covariance, np.cov(rows.double().T, aweights=counts, ddof=0))
    mean, square = moments(rows.split(77), counts)
    np.testing.assert_allclose(mean, np.average(rows.double(), axis=0, weights=counts))
    assert square == pytest.approx(np.average(rows.double().square().sum(1), weights=counts))
    assert variance(rows.split(77), counts) == pytest.approx(float(covariance.trace()))


def test_covariance_of_rows_that_come_in_pieces_with_an_empty_one_is_numpys(rows):
    sums = Covariance()
    for piece in (rows[:0], rows[:10], rows[10:10], rows[10:]):
        sums.add(piece.double())
    mean, covariance = sums.value()
    np.testing.assert_allclose(mean, rows.double().mean(0))
    np.testing.assert_allclose(covariance, np.cov(rows.double().T, ddof=0))
    assert sums.total == 300


@pytest.mark.parametrize("counts", [None, torch.zeros(300, dtype=torch.int64)], ids=["none", "zero"])
def test_without_counts_rows_weigh_alike(rows, counts):
    np.testing.assert_allclose(mean_and_covariance(rows.split(100), counts)[1], np.cov(rows.double().T, ddof=0))
    assert Spread.measure(rows.split(100), 300, counts).share_beyond(30) == pytest.approx(0.9)


def test_a_far_origin_loses_nothing(rows):
    spread, far = Spread.measure([rows.double()], 300), Spread.measure([rows.double() + 1e6], 300)
    torch.testing.assert_close(far.covariance, spread.covariance, rtol=1e-6, atol=1e-6)


def test_equal_rows_have_no_spread():
    spread = Spread.measure([torch.full((50, 3), 0.1)], 50)
    assert spread.variance == 0 and spread.spectra(1) == [[0.0, 0.0, 0.0]]


def test_share_beyond_the_most_popular(rows):
    counts = torch.arange(300)
    spread = Spread.measure([rows], 300, counts)
    assert spread.share_beyond(0) == pytest.approx(1)
    assert spread.share_beyond(100) == pytest.approx(sum(range(200)) / sum(range(300)))
    assert spread.share_beyond(300) == spread.share_beyond(1000) == 0


def test_spectra_are_the_principal_variances_of_the_parts(rows):
    spread = Spread.measure([rows], 300)
    for num_parts in (1, 2, 3, 6):
        for part, spectrum in zip(rows.chunk(num_parts, dim=1), spread.spectra(num_parts), strict=True):
            principal = torch.linalg.svdvals(part.double() - part.double().mean(0)).square() / 300
            torch.testing.assert_close(torch.tensor(spectrum, dtype=torch.float64), principal)


def test_one_axis_is_coded_by_the_formula_and_no_bits_keep_nothing():
    assert coded_variance([3.0], 0) == 3
    # Panter and Dite (1951): sqrt(3) pi / 2 over the bound; in one dimension, cells are balls.
    assert coded_variance([3.0], 4) == pytest.approx(3 * math.sqrt(3) * math.pi / 2 / 256)


def test_bits_go_where_they_pay():
    """The level of the water by bisection, without a formula for it."""
    axes, num_bits = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.01], dtype=torch.float64), 3
    low, high = 0.0, 4.0
    for _ in range(60):
        level = (low + high) / 2
        needed = float((axes / level).log2().clamp(min=0).sum()) / 2
        low, high = (level, high) if needed > num_bits else (low, level)
    bound, served = float(axes.clamp(max=level).sum()), int((axes > level).sum())
    assert served == 3
    ball = 2 / 5 * math.gamma(2.5) ** (2 / 3) * (5 / 3) ** 2.5
    assert coded_variance(axes.tolist(), num_bits) == pytest.approx((bound - 0.11) * ball + 0.11)


@pytest.mark.parametrize("num_bits", [2, 4, 6, 8])
@pytest.mark.parametrize("fall", [1.0, 0.7, 0.4])
def test_k_means_on_gaussian_rows_loses_what_is_foreseen(num_bits, fall):
    axes = fall ** torch.arange(8.0)
    points = torch.randn(20_000, 8, generator=seeded(3)) * axes.sqrt()
    words = kmeans(points, 2**num_bits, weights=torch.ones(len(points)), generator=seeded(4))
    lost = float((points - words[nearest(points, words)]).square().sum(1).mean())
    assert coded_variance(axes.tolist(), num_bits) == pytest.approx(lost, rel=0.35)
