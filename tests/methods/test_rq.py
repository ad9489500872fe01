import faiss
import pytest
import torch

from leanrec.methods import PQ, RQ, rq
from leanrec.ops.spread import Spread


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings, embedding_dim):
    draws = seeded(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws)


def squared_error(rows, weight):
    return float((rows - weight).square().sum(1).mean())


def greedy_residual_error(weight, num_levels, num_centroids):
    """Plain residual quantization: k-means of faiss on what the levels before leave."""
    residual = weight.numpy().copy()
    for _ in range(num_levels):
        level = faiss.Kmeans(weight.shape[1], num_centroids, niter=25, seed=1)
        level.train(residual)
        residual -= level.centroids[level.index.search(residual, 1)[1][:, 0]]
    return float((residual**2).sum(1).mean())


@pytest.mark.parametrize(("num_embeddings", "embedding_dim", "num_levels", "num_bits"), [(8000, 16, 4, 5), (20_000, 8, 3, 6)])
def test_error_is_not_above_that_of_faiss_and_clearly_below_that_of_greedy_levels(num_embeddings, embedding_dim, num_levels, num_bits):
    weight = make_weight(num_embeddings, embedding_dim)
    reference = faiss.ResidualQuantizer(embedding_dim, num_levels, num_bits)  # a beam of 5
    reference.train(weight.numpy())
    theirs = torch.from_numpy(reference.decode(reference.compute_codes(weight.numpy())))
    table = RQ(num_levels=num_levels, num_centroids=2**num_bits).build(num_embeddings, embedding_dim).fit(weight)
    assert squared_error(table.decode(), weight) <= squared_error(theirs, weight)
    assert squared_error(table.decode(), weight) <= 0.93 * greedy_residual_error(weight, num_levels, 2**num_bits)


def test_error_is_below_that_of_product_quantization_at_the_same_code_length():
    weight = make_weight(5000, 16)
    residual, product = (method.build(5000, 16).fit(weight) for method in (RQ(num_centroids=64), PQ(num_centroids=64)))
    assert squared_error(residual.decode(), weight) < 0.8 * squared_error(product.decode(), weight)


def test_a_row_is_the_sum_of_one_centroid_per_level():
    table = RQ(num_levels=3, num_centroids=20).build(200, 5).fit(make_weight(200, 5))
    codes = table.codes()
    expected = sum(table.codebooks[level][codes[:, level]] for level in range(3))
    torch.testing.assert_close(table.decode(), expected.detach())


def test_rounds_on_the_sample_lower_the_error(monkeypatch):
    weight, method = make_weight(8000, 16), RQ(num_centroids=32)
    with_rounds = method.build(8000, 16).fit(weight).decode()
    monkeypatch.setattr(rq, "_SAMPLE_ROUNDS", 0)
    assert squared_error(with_rounds, weight) < 0.98 * squared_error(method.build(8000, 16).fit(weight).decode(), weight)


def test_centroids_of_the_last_level_are_the_weighted_means_of_what_the_others_leave():
    weight, counts = make_weight(2000, 8), torch.randint(1, 1000, (2000,), generator=seeded(1))
    table = RQ(num_levels=2, num_centroids=16, weight_power=1.0).build(2000, 8).fit(weight, counts)
    first, last = table.codes().unbind(1)
    left = weight - table.codebooks[0][first].detach()
    for word in range(16):
        taken = last == word
        mean = (left[taken] * counts[taken, None]).sum(0) / counts[taken].sum()
        torch.testing.assert_close(table.codebooks[1, word].detach(), mean, rtol=1e-3, atol=1e-3)


def test_frequent_rows_are_kept_better_with_counts():
    weight = make_weight(5000, 8)
    counts = (1_000_000 / (1 + torch.arange(5000)) ** 1.2).long()
    method = RQ(num_levels=2, num_centroids=32)
    with_counts, without = method.build(5000, 8).fit(weight, counts).decode(), method.build(5000, 8).fit(weight).decode()
    assert squared_error(with_counts[:50], weight[:50]) < 0.7 * squared_error(without[:50], weight[:50])


def test_a_tiny_table_is_kept_exactly():
    weight = make_weight(10, 8)
    table = RQ().build(10, 8).fit(weight)
    torch.testing.assert_close(table.decode(), weight, rtol=1e-5, atol=1e-5)
    assert RQ().expected_error(Spread.measure([weight], 10)) == 0


def test_bytes_follow_the_formula():
    assert RQ(num_levels=4, num_centroids=256).nbytes(100_000, 16) == 100_000 * 4 + 4 * 256 * 16 * 4
    assert RQ(num_levels=3, num_centroids=2000).nbytes(100_001, 12) == -(-100_001 * 3 * 11 // 8) + 3 * 2000 * 12 * 4


@pytest.mark.parametrize(
    ("setting", "message"), [({"num_levels": 0}, "num_levels=0. Choose 1 to 32"), ({"num_centroids": 1}, "RQ has num_centroids=1. Choose 2")]
)
def test_settings_out_of_range_are_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        RQ(**setting).build(1000, 16)


def test_words_of_8_bits_take_a_quarter_and_lose_next_to_nothing():
    weight = make_weight(5000, 16)
    wide, narrow = (RQ(word_bits=bits).build(5000, 16).fit(weight) for bits in (32, 8))
    assert narrow.words.nbytes * 4 == wide.codebooks.nbytes
    assert squared_error(narrow.decode(), weight) < 1.02 * squared_error(wide.decode(), weight)


@torch.no_grad()
def test_each_column_has_steps_of_its_own_size():
    table = RQ(word_bits=8).build(1000, 16)
    codebooks = torch.randn(4, 256, 16, generator=seeded(2)) * torch.logspace(0, -6, 16)
    table.set_books(codebooks)
    steps = codebooks.abs().amax((0, 1)) / 127
    assert ((table.books() - codebooks).abs() <= 0.501 * steps).all()


def test_a_row_of_words_of_8_bits_is_their_sum_times_the_scales():
    table = RQ(num_levels=32, num_centroids=20, word_bits=8).build(200, 5).fit(make_weight(200, 5))
    table.words[:, :, 0] = -128  # the sum that comes closest to what 16 bits hold
    codes = table.codes()
    expected = sum(table.words[level][codes[:, level]].double() for level in range(32)) * table.scales.detach().double()
    torch.testing.assert_close(table.decode().double(), expected, rtol=1e-6, atol=0)


def test_other_numbers_of_bits_are_an_error():
    with pytest.raises(ValueError, match="word_bits=4"):
        RQ(word_bits=4).build(100, 8)
