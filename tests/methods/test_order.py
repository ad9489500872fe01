import pytest
import torch

from leanrec.methods.order import RowOrder, disorder, order_nbytes


@pytest.mark.parametrize("num_embeddings", [1, 2, 1000, 300_000])
def test_ranks_are_those_of_a_sort_by_count_and_are_paid_for(num_embeddings):
    counts = torch.randint(0, 10**6, (num_embeddings,), generator=torch.Generator().manual_seed(0))
    order = RowOrder(num_embeddings, sorted_rows=False)
    order.fit(counts)
    ids = order.row_ids()
    assert torch.equal(counts[ids], counts.sort(descending=True).values)
    assert torch.equal(order(ids), torch.arange(num_embeddings))
    assert sum(tensor.nbytes for tensor in order.state_dict().values()) == order_nbytes(num_embeddings, sorted_rows=False)


def test_sorted_rows_cost_nothing():
    order = RowOrder(1000, sorted_rows=True)
    counts = (10_000 / (1 + torch.arange(1000))).long()
    counts[:2] = torch.tensor([0, 3])  # padding and unknown stand first, however rare
    order.fit(counts)
    assert torch.equal(order(torch.tensor([7, 0])), torch.tensor([7, 0]))
    assert order_nbytes(1000, sorted_rows=True) == len(order.state_dict()) == 0


def test_rows_that_are_not_sorted_are_an_error_that_says_what_to_do():
    counts = torch.arange(1000)
    with pytest.raises(ValueError, match=r"counts do not fall with the row number.*Set sorted_rows=False"):
        RowOrder(1000, sorted_rows=True).fit(counts)


@pytest.mark.parametrize("num_rows", [1, 17, 999, 1000])
def test_counts_in_pieces_are_judged_as_counts_at_once(num_rows):
    falling = (10_000 / (1 + torch.arange(1000))).long()
    assert disorder(falling.split(num_rows), 1000) is None
    late = falling.clone()
    late[500:600] = 3000
    given, best = (int(counts[:16].sum()) for counts in (late[2:], late[2:].sort(descending=True).values))
    assert f"the first 16 rows make up {given} look-ups, the most popular 16 make up {best}." in disorder(late.split(num_rows), 1000)
