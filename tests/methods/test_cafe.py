import pytest
import torch

from leanrec.methods import CAFE, Hash
from leanrec.ops.hashing import hash_buckets
from leanrec.train.row_adam import RowAdam

V, D = 2000, 16


def make_weight(seed=0):
    return torch.randn(V, D, generator=torch.Generator().manual_seed(seed))


def make_counts():
    return (10_000 / (1 + torch.randperm(V, generator=torch.Generator().manual_seed(1)))).long()


def zipf_batches(num_steps, *, shift=0, batch_size=256, seed=0):
    """Ids drawn by Zipf's law, the most popular one being `shift`."""
    draws = torch.Generator().manual_seed(seed)
    shares = 1 / (1 + torch.arange(V, dtype=torch.float64)) ** 1.1
    return [(torch.multinomial(shares, batch_size, replacement=True, generator=draws) + shift) % V for _ in range(num_steps)]


def learn(table, batches, target):
    """Train a table to answer the target's rows, as the training loop would."""
    optimizer = RowAdam(table.parameters(), lr=0.02)
    for step, ids in enumerate(batches):
        (table(ids) - target[ids]).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter, rows in table.maintain(step):
            optimizer.forget(parameter, rows)
    return table


def begun(method, **settings):
    table = method.build(V, D, **settings)
    table.begin()
    return table


def error(table, target, ids):
    return float((table.decode()[ids] - target[ids]).square().mean() / target[ids].square().mean())


def test_hot_rows_are_kept_and_the_others_are_means():
    weight, counts = make_weight(), make_counts()
    table = CAFE(num_rows=300, medium_share=1e9).build(V, D).fit(weight, counts)
    hot = table.sketch.find(torch.arange(V))[1]
    assert int(hot.sum()) == 208  # 300 * 0.7 in whole buckets of 4
    rows = table.decode()
    assert torch.equal(rows[hot], weight[hot])
    buckets = hash_buckets(torch.arange(V), table.seeds[:1], 46).squeeze(1)
    for bucket in range(10):
        members = (buckets == bucket) & ~hot
        mean = (weight[members] * counts[members, None]).sum(0) / counts[members].sum()
        torch.testing.assert_close(rows[members], mean.expand(int(members.sum()), D), rtol=1e-4, atol=1e-5)


def test_medium_rows_are_sums_of_two_and_better_for_it():
    weight, counts = make_weight(), make_counts()
    one, two = (CAFE(num_rows=300, medium_share=share).build(V, D).fit(weight, counts) for share in (1e9, 0.0))
    medium = two.sketch.find(torch.arange(V))[2]
    assert int(medium.sum()) == 208
    assert torch.equal(one.decode()[~medium], two.decode()[~medium])
    shares = counts[medium, None] / counts[medium].sum()
    losses = [float((shares * (table.decode() - weight)[medium].square()).sum()) for table in (one, two)]
    assert losses[1] < 0.9 * losses[0]
    first, second = two._shared_places(torch.arange(V)).unbind(1)
    sums = two.rows[208:254][first] + two.rows[254:][second]
    assert torch.equal(two.decode()[medium], sums[medium])
    members = medium & (second == second[medium][0])
    left = (weight - two.rows[208:254][first])[members]
    mean = (left * counts[members, None]).sum(0) / counts[members].sum()
    torch.testing.assert_close(two.rows[254 + second[members][0]].detach(), mean.detach(), rtol=1e-4, atol=1e-5)


def test_training_from_scratch_beats_plain_hashing_of_the_same_size():
    target, batches = make_weight(), zipf_batches(200)
    method = CAFE(num_rows=100, half_life=200)
    table = learn(begun(method), batches, target)
    plain = learn(Hash(num_buckets=method.nbytes(V, D) // (4 * D)).build(V, D), batches, target)
    ids = torch.cat(batches[-20:])
    assert error(table, target, ids) < 0.85 * error(plain, target, ids)
    table.finish()
    state = table.state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) == method.nbytes(V, D)
    fresh = method.build(V, D, generator=torch.Generator().manual_seed(9))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.decode(), table.decode())


@pytest.mark.parametrize("score", ["gradient", "frequency"])
def test_hot_ids_follow_a_stream_that_shifts(score):
    target = make_weight()
    table = begun(CAFE(num_rows=128, half_life=20, score=score))
    before, after = torch.arange(16), torch.arange(1000, 1016)
    learn(table, zipf_batches(60), target)
    assert table.sketch.find(before)[1].float().mean() > 0.85
    assert not table.sketch.find(after)[1].any()
    learn(table, zipf_batches(140, shift=1000, seed=1), target)
    assert table.sketch.find(after)[1].float().mean() > 0.85
    assert table.sketch.find(before)[1].float().mean() < 0.15
    assert error(table, target, after) < 0.1


def test_a_promoted_id_answers_as_before_and_its_moments_are_forgotten():
    table = begun(CAFE(num_rows=16, num_slots=2, half_life=10**9))
    with torch.no_grad():
        table.rows.normal_(generator=torch.Generator().manual_seed(0))
    for step in range(6):
        ids = torch.arange(12 * step, 12 * step + 12)
        before = table(ids)
        before.square().sum().backward()
        [(parameter, rows)] = table.maintain(step)
        hot_rows, hot, _ = table.sketch.find(ids)
        assert hot.any() or step > 0
        assert parameter is table.rows
        assert torch.equal(rows.sort().values, hot_rows[hot].sort().values)
        if step == 0:  # nobody is demoted, so no shared row moves
            torch.testing.assert_close(table(ids)[hot], before[hot])


def test_a_demoted_id_leaves_its_vector_to_its_shared_rows():
    """One hot row, which id 3 has to give to id 4, and one shared row of each level."""
    table = begun(CAFE(num_rows=3, num_slots=2, half_life=10**9, score="frequency"))
    table.rows.data[:] = 0.0
    for step, ids in enumerate([[3, 3, 3], [4, 4], [4, 4]]):
        if step == 2:
            table.rows.data[0] = 1.0
            table.sketch.total += 3  # as if cold ids had been looked up three times
            assert torch.equal(table(torch.tensor([3])), torch.ones(1, D))
        table(torch.tensor(ids)).sum().backward()
        table.maintain(step)
    assert table.sketch.find(torch.tensor([3, 4]))[1].tolist() == [False, True]
    # 3 look-ups of id 3 against 6 of all that are not hot: a third of the vector. Then against 3 of all medium ones: half of what is left.
    torch.testing.assert_close(table.rows.detach()[:, 0], torch.tensor([0.0, 1 / 3, 1 / 3]))


def test_padding_is_never_counted_and_evaluation_neither():
    table = begun(CAFE(num_rows=16, num_slots=2, score="frequency"))
    table.padding_idx = 0
    table(torch.tensor([0, 0, 0, 7])).sum().backward()
    table.eval()
    table(torch.tensor([5, 5])).sum().backward()
    table.maintain(0)
    assert table.sketch.ids[table.sketch.ids >= 0].tolist() == [7]
    assert float(table.sketch.total) == 1


def test_gradient_scores_count_what_moves_a_row_and_a_step_weighs_as_many_as_it_looks_up():
    table = begun(CAFE(num_rows=16, num_slots=2))
    weights = torch.tensor([1.0, 3.0, 1.0, 3.0])
    (table(torch.tensor([8, 9, 8, 9])).sum(1) * weights * 1e-6).sum().backward()
    table.maintain(0)
    scores = dict(zip(table.sketch.ids.flatten().tolist(), table.sketch.scores.flatten().tolist(), strict=True))
    assert (scores[8], scores[9]) == pytest.approx((1, 3), rel=1e-4)


def test_training_goes_on_after_a_load_as_if_it_had_not_stopped():
    target, batches = make_weight(), zipf_batches(60)
    method = CAFE(num_rows=64, half_life=20)

    def run(table, some):
        for step, ids in enumerate(some):
            (table(ids) - target[ids]).square().sum().backward()
            with torch.no_grad():
                table.rows -= 1e-3 * table.rows.grad
            table.rows.grad = None
            list(table.maintain(step))
        return table

    whole = run(begun(method), batches)
    half = run(begun(method), batches[:30])
    resumed = begun(method, generator=torch.Generator().manual_seed(9))
    resumed.load_state_dict(half.state_dict())
    run(resumed, batches[30:])
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_sparse_gradient_holds_only_rows_that_answered():
    table = CAFE(num_rows=64).build(V, D).fit(make_weight(), make_counts())
    table.sparse = True
    ids = torch.arange(50)
    table(ids).sum().backward()
    gradient = table.rows.grad.coalesce()
    assert gradient.values().any(1).all()


def test_nothing_moves_unless_begun():
    table = CAFE(num_rows=64).build(V, D)
    table(torch.arange(10)).sum().backward()
    assert table.maintain(0) == ()
    assert not (table.sketch.ids >= 0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 5}, r"num_rows=5\. Choose at least 6: 4 hot rows and 2 shared ones"),
        ({"num_slots": 3}, "num_slots=3"),
        ({"hot_share": 1.0}, r"hot_share=1\.0"),
        ({"score": "clicks"}, "score='clicks'"),
        ({"half_life": 0}, "half_life=0"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CAFE(**settings).build(V, D)
