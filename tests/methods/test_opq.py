import faiss
import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from leanrec.methods import OPQ, PQ
from leanrec.methods.opq import allocate_axes, nearest_rotation
from leanrec.ops.spread import Spread


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings, embedding_dim):
    """Rows whose first columns vary most and go together: the case that a rotation is for."""
    draws = seeded(0)
    spread = 0.6 ** torch.arange(embedding_dim)
    mixture = torch.eye(embedding_dim) + 0.3 * torch.randn(embedding_dim, embedding_dim, generator=draws)
    return (torch.randn(num_embeddings, embedding_dim, generator=draws) * spread) @ mixture + 0.5


def squared_error(rows, weight):
    return float((rows - weight).square().sum(1).mean())


@pytest.mark.parametrize(("num_embeddings", "embedding_dim", "num_subspaces", "num_bits"), [(4000, 8, 2, 6), (3000, 12, 4, 4)])
def test_error_is_within_3_percent_of_faiss(num_embeddings, embedding_dim, num_subspaces, num_bits):
    weight = make_weight(num_embeddings, embedding_dim)
    rotation = faiss.OPQMatrix(embedding_dim, num_subspaces)
    rotation.pq = codec = faiss.ProductQuantizer(embedding_dim, num_subspaces, num_bits)
    rotation.train(weight.numpy())
    rotated = rotation.apply(weight.numpy())
    codec.train(rotated)
    theirs = torch.from_numpy(rotation.reverse_transform(codec.decode(codec.compute_codes(rotated))))
    table = OPQ(num_subspaces=num_subspaces, num_centroids=2**num_bits).build(num_embeddings, embedding_dim).fit(weight)
    assert squared_error(table.decode(), weight) <= 1.03 * squared_error(theirs, weight)


def test_it_loses_much_less_than_pq_where_the_first_columns_vary_most():
    weight = make_weight(3000, 8)
    rotated, plain = (kind(num_subspaces=4, num_centroids=16).build(3000, 8).fit(weight).decode() for kind in (OPQ, PQ))
    assert squared_error(rotated, weight) < 0.6 * squared_error(plain, weight)


def test_it_loses_no_more_than_pq_where_the_parts_are_those_of_the_columns():
    """Each pair of columns takes one of 16 values: PQ is exact, and the principal axes lead astray."""
    draws = seeded(1)
    values = torch.randn(3, 16, 2, generator=draws)
    weight = torch.cat([part[torch.randint(16, (2000,), generator=draws)] for part in values], dim=1)
    table = OPQ(num_subspaces=3, num_centroids=16).build(2000, 6).fit(weight)
    assert squared_error(table.decode(), weight) < 1e-9


def test_parts_that_a_rotation_hides_are_found_again():
    """Each half of a row is near one of 32 points, then rotated; the principal axes alone lose 0.77 of what PQ does, alternation 0.18."""
    draws = seeded(6)
    values = torch.randn(2, 32, 4, generator=draws)
    weight = torch.cat([part[torch.randint(32, (2000,), generator=draws)] for part in values], dim=1)
    weight = (weight + 0.1 * torch.randn(2000, 8, generator=draws)) @ torch.linalg.qr(torch.randn(8, 8, generator=draws))[0]
    rotated, plain = (kind(num_subspaces=2, num_centroids=32).build(2000, 8).fit(weight).decode() for kind in (OPQ, PQ))
    assert squared_error(rotated, weight) < 0.4 * squared_error(plain, weight)


def test_a_row_is_its_centroids_side_by_side_and_rotated():
    table = OPQ(num_subspaces=4, num_centroids=50).build(500, 8).fit(make_weight(500, 8))
    words = torch.cat([table.codebooks[subspace][table.codes()[:, subspace]] for subspace in range(4)], dim=1)
    torch.testing.assert_close(table.decode(), (words @ table.rotation).detach())


def test_the_rotation_is_orthogonal():
    table = OPQ(num_subspaces=2, num_centroids=16).build(500, 8).fit(make_weight(500, 8))
    torch.testing.assert_close(table.rotation @ table.rotation.T, torch.eye(8), rtol=0, atol=1e-5)


def test_frequent_rows_are_kept_better_with_counts():
    weight = make_weight(3000, 8)
    counts = (1_000_000 / (1 + torch.arange(3000)) ** 1.2).long()
    method = OPQ(num_subspaces=2, num_centroids=32)
    with_counts, without = method.build(3000, 8).fit(weight, counts).decode(), method.build(3000, 8).fit(weight).decode()
    assert squared_error(with_counts[:30], weight[:30]) < 0.7 * squared_error(without[:30], weight[:30])


def test_the_nearest_rotation_is_scipys_solution_of_the_procrustes_problem():
    words, rows = torch.randn(2, 50, 6, generator=seeded(2), dtype=torch.float64)
    weights = torch.rand(50, generator=seeded(3), dtype=torch.float64)
    root = weights.sqrt().unsqueeze(1).numpy()
    expected, _ = orthogonal_procrustes(words.numpy() * root, rows.numpy() * root)
    np.testing.assert_allclose(nearest_rotation(words, rows, weights).numpy(), expected, atol=1e-12)


def test_axes_are_dealt_out_evenly_by_the_product_of_their_variances():
    assert allocate_axes([20.0, 8.0, 4.0, 2.0, 1.5, 1.0], 2) == [[0, 3, 5], [1, 2, 4]]  # products 40 and 48
    assert allocate_axes([0.4, 0.3, 0.2, 0.1], 2) == [[0, 3], [1, 2]]  # variances below 1 change nothing
    assert sorted(axis for part in allocate_axes([1.0, 0.0, 0.0, 0.0], 2) for axis in part) == [0, 1, 2, 3]


def test_bytes_count_the_rotation():
    assert OPQ(num_subspaces=4, num_centroids=256).nbytes(100_000, 16) == 100_000 * 4 + 256 * 16 * 4 + 16 * 16 * 4


def test_no_more_is_expected_to_be_lost_than_by_pq():
    spread = Spread.measure([make_weight(3000, 8)], 3000)
    for parts in (2, 4):
        assert OPQ(num_subspaces=parts, num_centroids=16).expected_error(spread) < PQ(num_subspaces=parts, num_centroids=16).expected_error(spread)
