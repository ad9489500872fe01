from itertools import pairwise

import numpy as np
import pytest
import torch

from leanrec.methods import CpRec, MixedDim


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings, embedding_dim=8):
    """Rows in general position, far from zero."""
    return torch.randn(num_embeddings, embedding_dim, generator=seeded(0)) @ torch.randn(embedding_dim, embedding_dim, generator=seeded(1)) + 3


def falling_counts(num_embeddings):
    return (1_000_000 / (1 + torch.arange(num_embeddings))).long() + 1


def principal_rows(points, weights, width):
    """The best rows of this width by numpy: weighted mean and eigenvectors of the weighted covariance."""
    mean = np.average(points, axis=0, weights=weights)
    _, vectors = np.linalg.eigh(np.cov(points.T, aweights=weights, bias=True))
    axes = vectors[:, points.shape[1] - width :]
    return (points - mean) @ axes @ axes.T + mean


@pytest.mark.parametrize("num_embeddings", [850, 170_000])  # one piece of 4 MiB, and two
def test_rows_of_each_block_are_its_weighted_principal_components(num_embeddings):
    weight, counts = make_weight(num_embeddings), falling_counts(num_embeddings)
    table = CpRec(first_dim=6, min_dim=0, weight_power=1.0).build(num_embeddings, 8).fit(weight, counts)
    rows, points, weights = table.decode().double().numpy(), weight.double().numpy(), counts.double().numpy()
    cuts = [num_embeddings * share // 85 for share in (1, 5, 21, 85)]
    for width, (first, last) in zip([3, 1, 0], pairwise(cuts), strict=True):
        expected = principal_rows(points[first:last], weights[first:last], width)
        np.testing.assert_allclose(rows[first:last], expected, rtol=1e-3, atol=1e-3)


def test_unsorted_rows_are_coded_as_they_would_be_in_order():
    weight, counts, shuffle = make_weight(850), falling_counts(850), torch.randperm(850, generator=seeded(2))
    in_order = CpRec(first_dim=6).build(850, 8).fit(weight, counts)
    shuffled = CpRec(first_dim=6, sorted_rows=False).build(850, 8).fit(weight[shuffle], counts[shuffle])
    torch.testing.assert_close(shuffled.decode(), in_order.decode()[shuffle], rtol=1e-4, atol=1e-4)
    assert shuffled.nbytes - in_order.nbytes == (850 * 10 + 7) // 8


def test_counts_that_do_not_fall_are_an_error_where_rows_should_be_sorted():
    with pytest.raises(ValueError, match="Set sorted_rows=False"):
        MixedDim().build(850, 8).fit(make_weight(850), falling_counts(850).flip(0))


def test_a_block_that_a_projection_would_not_make_smaller_stays_whole():
    weight, method = make_weight(850), CpRec(first_dim=4)
    table = method.build(850, 8).fit(weight)
    assert 10 * 4 + 4 * 8 + 8 >= 10 * 8  # the first block's 10 rows, with the projection and its bias
    assert torch.equal(table.decode()[:10], weight[:10])
    assert not torch.allclose(table.decode()[10:50], weight[10:50], atol=0.1)
    assert table.nbytes == 4 * (10 * 8 + (40 * 2 + 2 * 8 + 8) + (160 + 8 + 8) + (640 + 8 + 8))


def test_sparse_gradients_are_those_of_a_dense_table():
    gradients = []
    for sparse in (False, True):
        table = CpRec(first_dim=6).build(850, 8, generator=seeded(3))
        table.sparse = sparse
        (table(torch.tensor([2, 30, 30, 600])) * torch.arange(8)).sum().backward()
        gradients.append([parameter.grad.to_dense() for parameter in table.parameters()])
        assert [block.rows.grad.is_sparse for block in table.blocks] == [sparse] * 4
    assert [len(block.rows.grad.coalesce().indices()[0]) for block in table.blocks] == [1, 1, 0, 1]  # no row that was not asked for
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(dense, sparse)


def test_trained_from_scratch_it_comes_near_the_best_fit():
    weight = make_weight(850)
    best = float((MixedDim(num_blocks=3).build(850, 8).fit(weight).decode() - weight).square().sum())
    table = MixedDim(num_blocks=3).build(850, 8, generator=seeded(4))
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    table.begin()
    for step in range(300):
        optimizer.zero_grad()
        (table(torch.arange(850)) - weight).square().sum().backward()
        optimizer.step()
        table.maintain(step)
    table.finish()
    assert float((table.decode() - weight).square().sum()) < 1.1 * best + 0.01
    assert table.nbytes == MixedDim(num_blocks=3).nbytes(850, 8)
