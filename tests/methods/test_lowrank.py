import numpy as np
import pytest
import torch

from leanrec.methods import LowRank


def make_weight(num_embeddings=2000, embedding_dim=12):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws) + 3


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_error_is_the_energy_of_the_singular_values_left_out(rank):
    weight = make_weight()
    table = LowRank(rank=rank).build(2000, 12).fit(weight)
    singular = np.linalg.svd((weight - weight.mean(0)).double().numpy(), compute_uv=False)
    error = float((table.decode() - weight).double().square().sum())
    assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4, abs=1e-4)


def test_rows_are_those_of_numpys_weighted_principal_components():
    weight, counts = make_weight(), torch.randint(1, 1000, (2000,), generator=torch.Generator().manual_seed(1))
    table = LowRank(rank=3, weight_power=1.0).build(2000, 12).fit(weight, counts)
    points, shares = weight.double().numpy(), counts.double().numpy()
    mean = np.average(points, axis=0, weights=shares)
    _, vectors = np.linalg.eigh(np.cov(points.T, aweights=shares))
    expected = (points - mean) @ vectors[:, -3:] @ vectors[:, -3:].T + mean
    np.testing.assert_allclose(table.decode().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_mean_far_from_zero_costs_no_precision():
    weight = make_weight() + 1000
    table = LowRank(rank=12).build(2000, 12).fit(weight)
    torch.testing.assert_close(table.decode(), weight, rtol=1e-6, atol=1e-3)


def test_bytes_follow_the_formula():
    assert LowRank(rank=3).nbytes(1000, 16) == (1000 * 3 + 3 * 16 + 16) * 4


def test_an_unfitted_table_has_rows_of_the_usual_spread():
    assert 0.007 < float(LowRank(rank=2).build(1000, 16).decode().std()) < 0.013


def test_a_rank_above_the_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"LowRank has rank=17, but embedding_dim=16\. Choose 1 to 16"):
        LowRank(rank=17).build(1000, 16)
