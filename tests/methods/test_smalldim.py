import pytest
import torch

import leanrec
from leanrec.methods import LowRank, SmallDim


def make_weight(num_embeddings=600, embedding_dim=12):
    draws = torch.Generator().manual_seed(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws) + 3


def test_a_fit_gives_the_rows_of_low_rank():
    weight, counts = make_weight(), torch.randint(1, 1000, (600,), generator=torch.Generator().manual_seed(1))
    rows = SmallDim(small_dim=3).build(600, 12).fit(weight, counts).decode()
    torch.testing.assert_close(rows, LowRank(rank=3).build(600, 12).fit(weight, counts).decode(), rtol=1e-4, atol=1e-4)


def test_bytes_are_a_smaller_table_a_projection_and_its_bias():
    assert SmallDim(small_dim=3).nbytes(1000, 16) == (1000 * 3 + 3 * 16 + 16) * 4


def test_the_order_of_the_rows_does_not_matter():
    table = torch.nn.Embedding(600, 12)
    counts = {"": torch.arange(600)}
    plan = leanrec.fit_budget(table, SmallDim(), ratio=3, counts=counts)
    assert isinstance(leanrec.compress(table, plan, counts=counts).method, SmallDim)


@pytest.mark.parametrize(("num_embeddings", "small_dim"), [(1000, 16), (4, 3)])
def test_a_table_that_it_would_not_make_smaller_is_kept_as_it_is(num_embeddings, small_dim):
    weight = make_weight(num_embeddings, 16)
    table = SmallDim(small_dim=small_dim).build(num_embeddings, 16).fit(weight)
    assert torch.equal(table.decode(), weight)
    assert table.nbytes == num_embeddings * 16 * 4


def test_trained_from_scratch_it_comes_near_the_best_fit():
    weight = make_weight()
    best = float((SmallDim(small_dim=3).build(600, 12).fit(weight).decode() - weight).square().sum())
    table = SmallDim(small_dim=3).build(600, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    table.begin()
    for step in range(300):
        optimizer.zero_grad()
        (table(torch.arange(600)) - weight).square().sum().backward()
        optimizer.step()
        table.maintain(step)
    table.finish()
    assert float((table.decode() - weight).square().sum()) < 1.05 * best


def test_a_dimension_above_that_of_the_table_is_an_error():
    with pytest.raises(ValueError, match=r"SmallDim has small_dim=17, but embedding_dim=16\. Choose 1 to 16"):
        SmallDim(small_dim=17).build(1000, 16)
