import numpy as np
import pytest
import torch

from leanrec.methods import QuotientRemainder
from leanrec.train.row_adam import RowAdam


def make_weight(num_embeddings=1000, embedding_dim=8):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def make_counts(num_embeddings=1000):
    return torch.randint(1, 500, (num_embeddings,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("operation", "combine"), [("multiply", np.multiply), ("add", np.add)])
def test_a_row_combines_those_of_quotient_and_remainder(operation, combine):
    table = QuotientRemainder(num_remainders=30, operation=operation).build(1000, 8)
    quotients, remainders = table.quotients.detach().numpy(), table.remainders.detach().numpy()
    expected = [combine(quotients[row // 30], remainders[row % 30]) for row in range(1000)]
    np.testing.assert_array_equal(table.decode().numpy(), expected)


def test_every_id_has_a_row_of_its_own():
    assert len(QuotientRemainder(num_remainders=32).build(1000, 8).decode().unique(dim=0)) == 1000


def test_a_fit_of_sums_is_weighted_least_squares():
    weight, counts = make_weight(), make_counts()
    table = QuotientRemainder(num_remainders=64, operation="add").build(1000, 8).fit(weight, counts)
    ids = torch.arange(1000)
    design = torch.cat([torch.nn.functional.one_hot(ids // 64, 16), torch.nn.functional.one_hot(ids % 64, 64)], dim=1).double()
    root = counts.double().sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(design * root, weight.double() * root, driver="gelsd").solution
    least = float(((design @ solution - weight) * root).square().sum())
    assert float(((table.decode() - weight) * root).square().sum()) < 1.001 * least


def test_a_fit_of_products_finds_the_first_singular_vectors_of_each_column():
    draws = torch.Generator().manual_seed(2)
    product = torch.randn(20, 1, 8, generator=draws) * torch.randn(1, 50, 8, generator=draws)
    weight = (product + 0.1 * torch.randn(20, 50, 8, generator=draws)).reshape(1000, 8)
    table = QuotientRemainder(num_remainders=50).build(1000, 8).fit(weight)
    for column in range(8):
        left, values, right = np.linalg.svd(weight[:, column].reshape(20, 50).double().numpy(), full_matrices=False)
        expected = values[0] * np.outer(left[:, 0], right[0]).ravel()
        np.testing.assert_allclose(table.decode()[:, column].numpy(), expected, atol=1e-3)


def test_popular_rows_are_kept_best():
    weight, counts = make_weight(), 100_000 // torch.arange(1, 1001)
    errors = (QuotientRemainder(num_remainders=100).build(1000, 8).fit(weight, counts).decode() - weight).square().mean(1)
    assert errors[:50].mean() < 0.3 * errors[500:].mean()


def test_as_many_remainders_as_rows_keep_the_table():
    weight = make_weight(200)
    for operation in ("multiply", "add"):
        torch.testing.assert_close(QuotientRemainder(num_remainders=500, operation=operation).build(200, 8).fit(weight).decode(), weight)


def test_bytes_are_those_of_both_tables():
    assert QuotientRemainder(num_remainders=30).nbytes(1000, 8) == (34 + 30) * 8 * 4


def test_knob_values_run_from_the_fewest_bytes_to_all_remainders():
    values = QuotientRemainder().knob_values(10_000, 8)
    least = min(QuotientRemainder(num_remainders=number).nbytes(10_000, 8) for number in range(1, 10_001))
    assert QuotientRemainder(num_remainders=values[0]).nbytes(10_000, 8) == least
    assert values[-1] == 10_000


def test_an_unfitted_table_has_rows_of_the_usual_spread():
    for operation in ("multiply", "add"):
        assert 0.008 < float(QuotientRemainder(operation=operation).build(10_000, 16).decode().std()) < 0.012


@pytest.mark.parametrize("sparse", [False, True])
def test_training_from_scratch_tells_rows_apart_that_share_a_remainder(sparse):
    draws = torch.Generator().manual_seed(3)
    target = torch.randn(20, 1, 8, generator=draws) * torch.randn(1, 50, 8, generator=draws)  # (quotients, remainders, D)
    target = target.reshape(1000, 8)
    table = QuotientRemainder(num_remainders=50).build(1000, 8, generator=draws)
    table.sparse = sparse
    optimizer = RowAdam(table.parameters(), lr=0.02)
    for _ in range(400):
        ids = torch.randint(1000, (256,), generator=draws)
        optimizer.zero_grad()
        (table(ids) - target[ids]).square().mean().backward()
        assert table.remainders.grad.is_sparse == table.quotients.grad.is_sparse == sparse
        optimizer.step()
    assert (table.decode() - target).square().mean() < 0.1 * target.var()
    assert table.nbytes == QuotientRemainder(num_remainders=50).nbytes(1000, 8)


def test_an_unknown_operation_is_an_error():
    with pytest.raises(ValueError, match=r"operation='concat'\. Choose one of \['multiply', 'add'\]"):
        QuotientRemainder(operation="concat").build(1000, 8)
