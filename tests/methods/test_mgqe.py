from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from leanrec.methods import DPQ, MGQE, PQ
from leanrec.methods.dpq import REVIVE_STEPS
from leanrec.ops.spread import Spread
from leanrec.train.row_adam import RowAdam

V, D, M = 400, 4, 2
SMALL = MGQE(num_subspaces=M, num_centroids=32, tail_centroids=(16, 4), tail_starts=(0.1, 0.5))
LIMITS = torch.tensor([32] * 40 + [16] * 160 + [4] * 200)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings=V):
    draws = seeded(0)
    return torch.randn(num_embeddings, D, generator=draws) @ torch.randn(D, D, generator=draws) * 0.1


def make_counts(num_embeddings=V):
    return (100_000 / (1 + torch.arange(num_embeddings)) ** 1.1).long()


def squared_errors(table, weight):
    return (table.decode() - weight).square().sum(1)


def test_rows_take_the_nearest_of_the_first_centroids_that_their_group_may_take():
    weight = make_weight()
    table = SMALL.build(V, D).fit(weight, make_counts())
    assert (table.codes() < LIMITS.unsqueeze(1)).all()
    chosen = 0
    for subspace in range(M):
        distances = torch.cdist(weight[:, 2 * subspace : 2 * subspace + 2], table.codebooks[subspace].detach())
        nearest = distances.masked_fill(torch.arange(32) >= LIMITS.unsqueeze(1), torch.inf).argmin(1)
        chosen += int((table.codes()[:, subspace] == nearest).sum())
    # The centroids moved to the means of their rows after the codes were chosen, so a few rows may now be nearer to another.
    assert chosen > 0.95 * V * M


def test_a_row_is_its_centroids_side_by_side():
    table = SMALL.build(V, D).fit(make_weight(), make_counts())
    expected = torch.cat([table.codebooks[subspace][table.codes()[:, subspace]] for subspace in range(M)], dim=1)
    assert torch.equal(table.decode(), expected)


def test_popular_rows_are_kept_as_by_the_many_centroids_and_rare_ones_nearly_as_by_the_few():
    weight, counts = make_weight(4000), make_counts(4000)
    method = MGQE(num_subspaces=M, num_centroids=128, tail_centroids=(16,))
    ours = squared_errors(method.build(4000, D).fit(weight, counts), weight)
    many = squared_errors(PQ(num_subspaces=M, num_centroids=128).build(4000, D).fit(weight, counts), weight)
    few = squared_errors(PQ(num_subspaces=M, num_centroids=16).build(4000, D).fit(weight, counts), weight)
    assert ours[:400].mean() < 1.1 * many[:400].mean() < 0.5 * few[:400].mean()
    assert ours[400:].mean() < 1.1 * few[400:].mean()


def test_rows_in_any_order_are_the_same_as_sorted_ones_but_for_the_stored_order():
    weight, counts = make_weight(), torch.arange(V, 0, -1)
    shuffled = torch.randperm(V, generator=seeded(3))
    table = replace(SMALL, sorted_rows=False).build(V, D, generator=seeded(4)).fit(weight[shuffled], counts[shuffled])
    in_order = SMALL.build(V, D, generator=seeded(4)).fit(weight, counts)
    assert (table.codes() < LIMITS[shuffled].unsqueeze(1)).all()
    assert float(squared_errors(table, weight[shuffled]).mean()) == pytest.approx(float(squared_errors(in_order, weight).mean()), rel=0.1)
    assert table.nbytes == in_order.nbytes + V * 9 / 8  # 9 bits tell 400 ranks apart


def test_bytes_follow_the_formula():
    method = MGQE(num_subspaces=3, num_centroids=256, tail_centroids=(64, 5), tail_starts=(0.1, 0.5))
    groups = [10_001 * 3 * 8, 39_999 * 3 * 6, 50_001 * 3 * 3]  # rows x parts x bits
    assert method.nbytes(100_001, 12) == sum(-(-bits // 8) for bits in groups) + 256 * 12 * 4


def test_one_centroid_for_each_row_keeps_a_tiny_table_exactly():
    weight = make_weight(3)
    torch.testing.assert_close(MGQE(num_subspaces=M).build(3, D).fit(weight).decode(), weight)


def test_it_is_expected_to_lose_more_than_the_many_and_less_than_the_few_centroids():
    spread = Spread.measure([make_weight(4000)], 4000, make_counts(4000))
    many, few = (PQ(num_subspaces=M, num_centroids=size).expected_error(spread) for size in (128, 16))
    assert many < MGQE(num_subspaces=M, num_centroids=128, tail_centroids=(16,)).expected_error(spread) < few


def test_codes_that_are_set_are_the_codes_it_answers_by():
    table = SMALL.build(V, D)
    codes = torch.randint(32, (V, M), generator=seeded(2)) % LIMITS.unsqueeze(1)
    table.set_codes(codes)
    assert torch.equal(table.codes(), codes)
    table.set_codes(torch.zeros(100, M, dtype=torch.int64), start=16)
    assert torch.equal(table.codes(), torch.cat([codes[:16], torch.zeros(100, M, dtype=torch.int64), codes[116:]]))


def test_an_unfitted_table_uses_all_the_codes_of_each_group_and_no_others():
    codes = SMALL.build(V, D).codes()
    assert [int(codes[limits == LIMITS].max()) for limits in (32, 16, 4)] == [31, 15, 3]


@pytest.mark.parametrize("variant", ["vq", "sx"])
def test_training_from_scratch_keeps_to_the_groups_and_beats_random_codes(variant):
    weight = make_weight()
    table, fixed = replace(SMALL, variant=variant, commitment=0.25).build(V, D), PQ(num_subspaces=M, num_centroids=32).build(V, D)
    for each in (table, fixed):
        each.begin()
        each.sparse = True
        optimizer, draws = RowAdam(each.parameters(), lr=0.02), seeded(1)
        for step in range(150):
            ids = torch.randint(V, (128,), generator=draws)
            ((each(ids) - weight[ids]).square().sum(1).mean() + each.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            each.maintain(step)
    answers = table.eval().decode()
    table.finish()
    assert torch.equal(table.decode(), answers)
    assert table.nbytes == SMALL.nbytes(V, D)
    assert (table.codes() < LIMITS.unsqueeze(1)).all()
    assert squared_errors(table, weight).mean() < 0.6 * squared_errors(fixed, weight).mean()


def test_the_softmax_of_a_row_is_over_the_centroids_it_may_take():
    table = replace(SMALL, variant="sx").build(V, D)
    logits = torch.randn(M, 3, 32, generator=seeded(5))
    shares = table._softmax(logits, torch.tensor([0, 100, 300]))
    for row, limit in enumerate((32, 16, 4)):
        torch.testing.assert_close(shares[:, row, :limit], F.softmax(logits[:, row, :limit], dim=1))
        assert not shares[:, row, limit:].any()


def test_codes_of_popular_rows_alone_start_again_at_popular_rows():
    table = SMALL.build(V, D)
    table.begin()
    with torch.no_grad():
        table.queries[7], table.queries[200:] = 5.0, 9.0 + torch.rand(200, D, generator=seeded(6))  # tail rows fit worse, but cannot take them
        table.codebooks[:, 20] = 99.0
    for step in range(REVIVE_STEPS):
        table(torch.arange(V))
        table.maintain(step)
    torch.testing.assert_close(table.eval()(torch.tensor(7)), torch.full((D,), 5.0))


def test_with_one_group_it_is_dpq():
    weight = make_weight()
    alone = MGQE(num_subspaces=M, num_centroids=16, tail_centroids=(), tail_starts=())
    assert alone.nbytes(V, D) == DPQ(num_subspaces=M, num_centroids=16).nbytes(V, D)
    errors = [float(squared_errors(method.build(V, D).fit(weight), weight).mean()) for method in (alone, DPQ(num_subspaces=M, num_centroids=16))]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize(
    "settings", [{"tail_centroids": (512,)}, {"tail_starts": (1.0,)}, {"tail_starts": (0.0,)}, {"tail_starts": (0.1, 0.2)}, {"tail_centroids": (1,)}]
)
def test_groups_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="centroids"):
        MGQE(**settings).build(V, D)


def test_rows_that_are_not_sorted_are_refused_when_they_should_be():
    with pytest.raises(ValueError, match="sorted_rows=False"):
        SMALL.build(V, D).fit(make_weight(), torch.arange(V))


def test_budgets_try_the_tail_in_proportion_to_the_head():
    settings = {(setting.num_centroids, setting.tail_centroids) for setting in MGQE().variants(1000, 4)}
    assert settings >= {(1024, (256,)), (256, (64,)), (4, (2,))}
