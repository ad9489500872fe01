import re

import faiss
import pytest
import torch

from leanrec.methods import PQ
from leanrec.ops.kmeans import sample_rows
from leanrec.ops.spread import Spread


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings, embedding_dim):
    draws = seeded(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws)


def squared_error(rows, weight):
    return float((rows - weight).square().sum(1).mean())


@pytest.mark.parametrize(("num_embeddings", "embedding_dim", "num_subspaces", "num_bits"), [(5000, 16, 4, 8), (5000, 12, 6, 4), (40_000, 8, 2, 6)])
def test_error_is_within_2_percent_of_faiss(num_embeddings, embedding_dim, num_subspaces, num_bits):
    weight = make_weight(num_embeddings, embedding_dim)
    reference = faiss.ProductQuantizer(embedding_dim, num_subspaces, num_bits)
    reference.train(weight.numpy())
    theirs = torch.from_numpy(reference.decode(reference.compute_codes(weight.numpy())))
    method = PQ(num_subspaces=num_subspaces, num_centroids=2**num_bits)
    ours = method.build(num_embeddings, embedding_dim).fit(weight).decode()
    assert squared_error(ours, weight) <= 1.02 * squared_error(theirs, weight)


def test_a_row_is_its_centroids_side_by_side():
    table = PQ(num_subspaces=4, num_centroids=50).build(100, 12).fit(make_weight(100, 12))
    codes = table.codes()
    expected = torch.cat([table.codebooks[subspace][codes[:, subspace]] for subspace in range(4)], dim=1)
    assert torch.equal(table.decode(), expected)


def test_every_part_has_the_centroid_nearest_to_it():
    weight = make_weight(3000, 8)
    table = PQ(num_subspaces=2, num_centroids=32).build(3000, 8).fit(weight)
    nearest = torch.cdist(weight[:, 4:], table.codebooks[1].detach()).argmin(1)
    # The centroids moved to the means of their rows after the codes were chosen, so a few rows at a border may now be nearer to another.
    assert (table.codes()[:, 1] == nearest).float().mean() > 0.95


def test_centroids_are_the_weighted_means_of_their_rows():
    weight, counts = make_weight(3000, 8), torch.randint(1, 1000, (3000,), generator=seeded(1))
    table = PQ(num_subspaces=2, num_centroids=32, weight_power=1.0).build(3000, 8).fit(weight, counts)
    taken = table.codes()[:, 0] == 5
    mean = (weight[taken, :4] * counts[taken, None]).sum(0) / counts[taken].sum()
    torch.testing.assert_close(table.codebooks[0, 5].detach(), mean, rtol=1e-4, atol=1e-4)


def test_frequent_rows_are_kept_better_with_counts():
    weight = make_weight(5000, 8)
    counts = (1_000_000 / (1 + torch.arange(5000)) ** 1.2).long()
    method = PQ(num_subspaces=2, num_centroids=64)
    with_counts, without = method.build(5000, 8).fit(weight, counts).decode(), method.build(5000, 8).fit(weight).decode()
    assert squared_error(with_counts[:50], weight[:50]) < 0.7 * squared_error(without[:50], weight[:50])
    assert squared_error(with_counts, weight) > squared_error(without, weight)


def test_a_table_larger_than_its_sample_fits_as_well_as_the_sample():
    weight = make_weight(60_000, 8)
    method = PQ(num_subspaces=2, num_centroids=16)
    assert len(sample_rows(torch.ones(60_000), 16, generator=seeded(0))[0]) == 4096
    table = method.build(60_000, 8).fit(weight)
    reference = faiss.ProductQuantizer(8, 2, 4)
    reference.train(weight.numpy())
    theirs = torch.from_numpy(reference.decode(reference.compute_codes(weight.numpy())))
    assert squared_error(table.decode(), weight) <= 1.03 * squared_error(theirs, weight)


def test_a_tiny_table_is_kept_exactly_and_pays_for_its_rows_only():
    weight = make_weight(10, 8)
    table = PQ(num_subspaces=2, num_centroids=256).build(10, 8).fit(weight)
    torch.testing.assert_close(table.decode(), weight, rtol=1e-6, atol=1e-6)
    assert table.nbytes == 10 * 2 * 4 // 8 + 10 * 8 * 4  # 4 bits tell ten centroids apart
    assert PQ().expected_error(Spread.measure([weight], 10)) == 0


def test_bytes_follow_the_formula():
    assert PQ(num_subspaces=4, num_centroids=256).nbytes(100_000, 16) == 100_000 * 4 + 256 * 16 * 4
    assert PQ(num_subspaces=3, num_centroids=2000).nbytes(100_001, 12) == -(-100_001 * 3 * 11 // 8) + 2000 * 12 * 4


def test_codes_that_are_set_are_the_codes_it_answers_by():
    table = PQ(num_subspaces=2, num_centroids=20).build(30, 4)
    codes = torch.randint(20, (30, 2), generator=seeded(2))
    table.set_codes(codes)
    assert torch.equal(table.codes(), codes)
    table.set_codes(torch.full((14, 2), 7), start=16)
    assert torch.equal(table.codes(), torch.cat([codes[:16], torch.full((14, 2), 7)]))


def test_training_moves_the_code_books_and_not_the_codes():
    table = PQ().build(500, 16).fit(make_weight(500, 16))
    codes, before = table.codes(), table.codebooks.detach().clone()
    table(torch.arange(100)).square().sum().backward()
    torch.optim.SGD(table.parameters(), lr=0.1).step()
    assert not torch.equal(table.codebooks, before)
    assert torch.equal(table.codes(), codes)


def test_variants_are_all_parts_times_all_sizes_that_a_table_can_use():
    settings = {(setting.num_subspaces, setting.num_centroids) for setting in PQ().variants(100, 6)}
    assert settings == {(parts, size) for parts in (1, 2, 3, 6) for size in (4, 8, 16, 32, 64, 128)}


def test_a_dimension_that_does_not_divide_is_an_error_with_the_choices():
    message = "PQ splits a row into num_subspaces=5 equal parts, but embedding_dim=16 is not divisible by 5. Choose one of [1, 2, 4, 8, 16]."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PQ(num_subspaces=5).nbytes(1000, 16)


@pytest.mark.parametrize("num_centroids", [0, 1, 65_537])
def test_a_number_of_centroids_out_of_range_is_an_error(num_centroids):
    with pytest.raises(ValueError, match=f"num_centroids={num_centroids}. Choose 2 to 65536"):
        PQ(num_centroids=num_centroids).build(1000, 16)


def test_counts_of_another_length_are_an_error():
    with pytest.raises(ValueError, match=r"counts has shape \(999,\), but the table has 1000 rows"):
        PQ().build(1000, 16).fit(make_weight(1000, 16), torch.ones(999, dtype=torch.int64))
