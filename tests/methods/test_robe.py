import numpy as np
import pytest
import torch

from leanrec.methods import ROBE
from leanrec.ops.hashing import hash_buckets
from leanrec.train.row_adam import RowAdam


def make_weight(num_embeddings=1000, embedding_dim=12):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def make_counts(num_embeddings=1000):
    return torch.randint(1, 500, (num_embeddings,), generator=torch.Generator().manual_seed(1))


def places_and_signs(table, num_blocks, block_size):
    """The paper's addresses, value by value: (V, D) each."""
    size = len(table.array)
    places = np.zeros((table.num_embeddings, table.embedding_dim), dtype=np.int64)
    signs = np.zeros_like(places)
    for row in range(table.num_embeddings):
        for column in range(table.embedding_dim):
            block, offset = divmod(column, block_size)
            value = int(hash_buckets(torch.tensor([row * num_blocks + block]), table.seeds, 2 * size))
            places[row, column] = (value // 2 + offset) % size
            signs[row, column] = -1 if value % 2 else 1
    return places, signs


@pytest.mark.parametrize(("block_size", "num_blocks"), [(4, 3), (8, 2), (1, 12), (50, 1)])
def test_a_row_is_read_in_blocks_from_hashed_places_on(block_size, num_blocks):
    table = ROBE(array_size=70, block_size=block_size).build(100, 12)
    places, signs = places_and_signs(table, num_blocks, min(block_size, 12))
    np.testing.assert_array_equal(table.decode().numpy(), signs * table.array.detach().numpy()[places])
    assert (np.diff(places[:, :block_size]) < 0).any() == (block_size > 1)  # some block wraps around the end


def test_places_and_signs_are_spread_evenly():
    places, signs = places_and_signs(ROBE(array_size=100).build(1000, 12), 2, 8)
    assert np.bincount(places.ravel(), minlength=100).min() / 120 > 0.7 and np.bincount(places.ravel()).max() / 120 < 1.3
    assert abs(signs.mean()) < 0.05


def test_each_number_is_the_weighted_mean_of_the_values_that_share_it():
    weight, counts = make_weight() + 3, make_counts()
    table = ROBE(array_size=300).build(1000, 12).fit(weight, counts)
    mean = np.average(weight.double().numpy(), axis=0, weights=counts)
    np.testing.assert_allclose(table.mean.detach().numpy(), mean, rtol=1e-5)
    places, signs = places_and_signs(table, 2, 8)
    values, shares = signs * (weight.numpy() - mean), np.broadcast_to(counts[:, None], places.shape)
    for place in range(0, 300, 7):
        taken = places == place
        assert table.array[place].item() == pytest.approx(np.average(values[taken], weights=shares[taken]), abs=1e-5)


def test_rows_share_parts_of_one_another_but_seldom_all():
    rows = ROBE(array_size=500, block_size=4).build(1000, 12).decode()
    assert len(rows.abs().unique()) <= 500
    assert len(rows.unique(dim=0)) == 1000


def test_an_array_with_a_number_for_each_value_keeps_the_table():
    weight = make_weight(50)
    table = ROBE(array_size=10_000).build(50, 12).fit(weight)
    torch.testing.assert_close(table.decode(), weight)
    assert ROBE(array_size=10_000).nbytes(50, 12) == table.nbytes == (50 * 12 + 12) * 4 + 8


def test_bytes_are_the_array_the_mean_and_the_seed():
    assert ROBE(array_size=1000).nbytes(100_000, 12) == (1000 + 12) * 4 + 8


def test_an_unfitted_table_has_rows_of_the_usual_spread():
    assert 0.009 < float(ROBE().build(1000, 16).decode().std()) < 0.011


def test_training_from_scratch_reaches_what_least_squares_would():
    weight = make_weight(300)
    setting, draws = ROBE(array_size=900), torch.Generator().manual_seed(3)
    table = setting.build(300, 12, generator=draws)
    optimizer = RowAdam(table.parameters(), lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        ids = torch.randint(300, (200,), generator=draws)
        optimizer.zero_grad()
        (table(ids) - weight[ids]).square().mean().backward()
        optimizer.step()
    best = setting.build(300, 12, generator=torch.Generator().manual_seed(3)).fit(weight)
    assert (table.decode() - weight).square().mean() < 1.05 * (best.decode() - weight).square().mean()
    assert table.nbytes == setting.nbytes(300, 12)


def test_a_block_of_no_columns_is_an_error():
    with pytest.raises(ValueError, match=r"ROBE has block_size=0\. Choose 1 to 12"):
        ROBE(block_size=0).build(1000, 12)
