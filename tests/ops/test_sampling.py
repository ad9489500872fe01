import pytest
import torch

from leanrec.ops.sampling import systematic_sample


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def falling(num_rows):
    return 1 / (1 + torch.arange(num_rows)) ** 1.1


def test_every_row_is_drawn_a_whole_number_of_times_on_either_side_of_its_share():
    weights = falling(100_000)
    ids, found = systematic_sample(lambda: [weights], 1024, generator=seeded(0))
    assert torch.equal(ids, ids.unique()) and float(found.sum()) == 1024
    drawn = torch.zeros(100_000).index_add_(0, ids, found)
    assert (drawn - weights / weights.sum() * 1024).abs().max() < 1.01


@pytest.mark.parametrize("chunk_rows", [1, 7, 4999])
def test_chunks_draw_what_all_weights_at_once_draw(chunk_rows):
    weights = falling(5000)
    weights[100:200] = 0  # whole chunks without weight
    whole = systematic_sample(lambda: [weights], 300, generator=seeded(1))
    parts = systematic_sample(lambda: weights.split(chunk_rows), 300, generator=seeded(1))
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])
    assert not ((whole[0] >= 100) & (whole[0] < 200)).any()


def test_a_small_table_is_taken_whole_with_its_weights():
    weights = torch.rand(1000, generator=seeded(2))
    ids, found = systematic_sample(lambda: weights.split(64), 1000, generator=seeded(3))
    assert torch.equal(ids, torch.arange(1000)) and torch.equal(found, weights)


def test_with_an_even_share_a_sample_still_weighs_as_the_rows_it_stands_for():
    weights = falling(500_000)
    ids, found = systematic_sample(lambda: weights.split(70_000), 100_000, even_share=0.5)
    assert len(ids) < 140_000
    assert int((ids >= 10_000).sum()) > 49_000  # half of the draws go to all rows alike
    share = found.double() / found.double().sum()
    for first, last in [(0, 10), (10, 1000), (1000, 100_000), (100_000, 500_000)]:
        inside = (ids >= first) & (ids < last)
        expected = float(weights[first:last].double().sum() / weights.double().sum())
        assert float(share[inside].sum()) == pytest.approx(expected, rel=0.01)
