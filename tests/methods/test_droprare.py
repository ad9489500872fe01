import numpy as np
import pytest
import torch

from leanrec.methods import DropRare


def make_weight(num_embeddings=300, embedding_dim=8):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def make_counts(num_embeddings=300):
    return torch.randint(1, 5000, (num_embeddings,), generator=torch.Generator().manual_seed(1))


def test_popular_rows_are_kept_and_rare_rows_are_their_mean_weighted_by_counts():
    weight, counts = make_weight(), make_counts()
    rows = DropRare(num_kept=40, sorted_rows=False).build(300, 8).fit(weight, counts).decode().numpy()
    ranked = np.argsort(-counts.numpy(), kind="stable")
    popular, rare = ranked[:40], ranked[40:]
    np.testing.assert_array_equal(rows[popular], weight.numpy()[popular])
    mean = np.average(weight.numpy()[rare], axis=0, weights=counts.numpy()[rare])
    np.testing.assert_allclose(rows[rare], np.tile(mean, (260, 1)), rtol=1e-5, atol=1e-6)


def test_sorted_rows_are_cut_by_their_number():
    weight, counts = make_weight(), make_counts().sort(descending=True).values
    by_number = DropRare(num_kept=40).build(300, 8).fit(weight, counts)
    by_count = DropRare(num_kept=40, sorted_rows=False).build(300, 8).fit(weight, counts)
    assert torch.equal(by_number.decode(), by_count.decode())
    assert torch.equal(by_number.decode()[:40], weight[:40])


def test_counts_that_do_not_fall_are_an_error_where_rows_should_be_sorted():
    with pytest.raises(ValueError, match="Set sorted_rows=False"):
        DropRare(num_kept=40).build(300, 8).fit(make_weight(), make_counts().sort().values)


@pytest.mark.parametrize("num_kept", [299, 300, 1000])
def test_a_table_of_as_many_rows_is_kept_whole(num_kept):
    weight = make_weight()
    table = DropRare(num_kept=num_kept).build(300, 8).fit(weight)
    assert torch.equal(table.decode(), weight)
    assert table.nbytes == 300 * 8 * 4


def test_bytes_are_the_kept_rows_the_shared_one_and_an_order_of_9_bits_a_row():
    assert DropRare(num_kept=40).nbytes(300, 8) == 41 * 8 * 4
    assert DropRare(num_kept=40, sorted_rows=False).nbytes(300, 8) == 41 * 8 * 4 + (300 * 9 + 7) // 8


def test_sparse_gradients_touch_the_rows_asked_for_and_the_shared_one():
    table = DropRare(num_kept=40).build(300, 8)
    table.sparse = True
    table(torch.tensor([3, 100, 250])).sum().backward()
    gradient = table.rows.grad.coalesce()
    assert gradient.indices().tolist() == [[3, 40]]
    assert gradient.values()[:, 0].tolist() == [1.0, 2.0]


def test_trained_from_scratch_the_shared_vector_becomes_the_mean_of_the_rare_targets():
    target = make_weight()
    table = DropRare(num_kept=40).build(300, 8)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    table.begin()
    for step in range(200):
        optimizer.zero_grad()
        (table(torch.arange(300)) - target).square().sum().backward()
        optimizer.step()
        table.maintain(step)
    table.finish()
    torch.testing.assert_close(table.decode()[:40], target[:40], rtol=0, atol=0.01)
    torch.testing.assert_close(table.decode()[299], target[40:].mean(0), rtol=0, atol=0.01)
