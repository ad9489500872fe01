import numpy as np
import pytest
import torch

from leanrec.methods import TensorTrain
from leanrec.methods.tensor_train import column_sizes, digit_sizes
from leanrec.train.row_adam import RowAdam


def make_weight(num_embeddings=1000, embedding_dim=12):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws)


def tensor_train(points, rank):
    """TT-SVD of (1000, 12) points by numpy, from the last core on: the product of the three cores."""
    tensor = points.reshape(10, 10, 10, 2, 2, 3).transpose(0, 3, 1, 4, 2, 5)  # (i1, d1, i2, d2, i3, d3)
    _, _, last = np.linalg.svd(tensor.reshape(-1, 30), full_matrices=False)
    rest = tensor.reshape(-1, 30) @ last[:rank].T
    first, _, _ = np.linalg.svd(rest.reshape(20, -1), full_matrices=False)
    rest = first[:, :rank] @ (first[:, :rank].T @ rest.reshape(20, -1))
    return (rest.reshape(-1, min(rank, 30)) @ last[:rank]).reshape(10, 2, 10, 2, 10, 3).transpose(0, 2, 4, 1, 3, 5).reshape(1000, 12)


def test_a_row_is_the_product_of_the_matrices_of_its_digits():
    table = TensorTrain(rank=5).build(90, 12)
    first, middle, last = (core.detach().double().numpy() for core in (table.first, table.middle, table.last))
    assert (len(first), len(middle), len(last)) == digit_sizes(90) == (4, 5, 5)
    for row in (0, 7, 33, 89):
        i1, i2, i3 = row // 25, row // 5 % 5, row % 5
        expected = np.einsum("ar,rbs,sc->abc", first[i1], middle[i2].reshape(5, 2, 5), last[i3]).ravel()
        np.testing.assert_allclose(table(torch.tensor(row)).detach().numpy(), expected, atol=1e-7)


def test_large_batches_get_the_rows_and_gradients_of_small_ones():
    table, ids = TensorTrain(rank=5).build(300, 12), torch.randint(300, (500,), generator=torch.Generator().manual_seed(1))
    mixture = torch.randn(500, 12, generator=torch.Generator().manual_seed(2))
    (large,) = torch.autograd.grad((table(ids) * mixture).sum(), table.middle)
    (small,) = torch.autograd.grad((torch.cat([table(few) for few in ids.split(10)]) * mixture).sum(), table.middle)
    torch.testing.assert_close(table(ids), torch.cat([table(few) for few in ids.split(10)]))
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("rank", [1, 7, 25])
def test_a_fit_is_numpys_tt_svd_of_the_rows_less_their_mean(rank):
    weight = make_weight() + 3
    mean = weight.double().mean(0).numpy()
    expected = tensor_train(weight.double().numpy() - mean, rank) + mean
    np.testing.assert_allclose(TensorTrain(rank=rank).build(1000, 12).fit(weight).decode().numpy(), expected, atol=1e-3)


def test_weights_of_digits_are_those_of_a_weighted_tt_svd():
    draws, weight = torch.Generator().manual_seed(1), make_weight()
    digits = [torch.randint(1, 30, (10,), generator=draws) for _ in range(3)]
    counts = torch.einsum("a,b,c->abc", *digits).flatten()
    table = TensorTrain(rank=7).build(1000, 12).fit(weight, counts)
    roots = counts.double().sqrt().unsqueeze(1).numpy()
    mean = np.average(weight.double().numpy(), axis=0, weights=counts)
    expected = tensor_train((weight.double().numpy() - mean) * roots, 7) / roots + mean
    np.testing.assert_allclose(table.decode().numpy(), expected, atol=1e-2)


def test_counts_lower_the_error_of_look_ups_where_ids_are_sorted():
    weight, counts = make_weight(), 100_000 // torch.arange(1, 1001)
    tables = [TensorTrain(rank=8).build(1000, 12).fit(weight, given) for given in (counts, None)]
    weighted, plain = (float(counts.float() @ (table.decode() - weight).square().sum(1)) for table in tables)
    assert weighted < 0.7 * plain


@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [(1000, 12), (37, 7), (10, 16), (1, 8)])
def test_the_largest_rank_keeps_the_table(num_embeddings, embedding_dim):
    weight = make_weight(num_embeddings, embedding_dim)
    rank = TensorTrain().knob_values(num_embeddings, embedding_dim)[-1]
    torch.testing.assert_close(TensorTrain(rank=rank).build(num_embeddings, embedding_dim).fit(weight).decode(), weight, rtol=1e-3, atol=1e-4)


def test_bytes_are_those_of_the_cores_and_the_mean():
    assert TensorTrain(rank=4).nbytes(1000, 12) == (10 * 2 * 4 + 10 * 4 * 2 * 4 + 10 * 4 * 3 + 12) * 4


@pytest.mark.parametrize(("embedding_dim", "expected"), [(16, (2, 2, 4)), (32, (4, 2, 4)), (7, (1, 1, 7)), (64, (4, 4, 4)), (1, (1, 1, 1))])
def test_columns_are_split_as_evenly_as_they_can_be(embedding_dim, expected):
    assert column_sizes(embedding_dim) == expected


def test_digits_number_every_row_with_few_to_spare():
    for num_embeddings in [1, 2, 3, 8, 9, 26, 27, 28, 999, 10**6, 10**7 + 1]:
        product = int(np.prod(digit_sizes(num_embeddings)))
        assert num_embeddings <= product <= num_embeddings + 2 * num_embeddings ** (2 / 3) + 1


@pytest.mark.parametrize("rank", [1, 8])
def test_an_unfitted_table_has_rows_of_the_usual_spread_that_do_not_crowd_near_zero(rank):
    rows = TensorTrain(rank=rank).build(10_000, 16).decode()
    assert 0.008 < float(rows.std()) < 0.012
    assert (rows.abs() < 0.001).float().mean() < 0.1  # 0.08 of normal draws, 0.3 of products of three normal draws


def test_training_from_scratch_learns_a_tensor_train():
    draws = torch.Generator().manual_seed(3)
    target = TensorTrain(rank=3).build(1000, 12, generator=draws).decode() * 100
    table = TensorTrain(rank=5).build(1000, 12, generator=draws)
    optimizer = RowAdam(table.parameters(), lr=0.02)
    for _ in range(300):
        ids = torch.randint(1000, (256,), generator=draws)
        optimizer.zero_grad()
        (table(ids) - target[ids]).square().mean().backward()
        optimizer.step()
    assert (table.decode() - target).square().mean() < 0.1 * target.var()
    assert table.nbytes == TensorTrain(rank=5).nbytes(1000, 12)
