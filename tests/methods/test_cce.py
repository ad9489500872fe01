import pytest
import torch

from leanrec.methods import CCE
from leanrec.ops.hashing import hash_buckets
from leanrec.train.row_adam import RowAdam


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings=1000, embedding_dim=8):
    return torch.randn(num_embeddings, embedding_dim, generator=seeded(0))


def relative_error(rows, weight):
    return float((rows - weight).square().sum() / (weight - weight.mean(0)).square().sum())


def begun(method, num_embeddings=1000, embedding_dim=8, seed=0):
    table = method.build(num_embeddings, embedding_dim, generator=seeded(seed))
    table.begin()
    return table


def randomize(table):
    """Rows as training might leave them: clustered and hashed ones of the same spread."""
    with torch.no_grad():
        table.clustered.normal_(generator=seeded(1))
        table.hashed.normal_(generator=seeded(2))
    return table


def test_a_row_is_the_sum_of_a_clustered_and_a_hashed_row_part_by_part():
    table = randomize(CCE(num_chunks=2, num_rows=16).build(1000, 8))
    for number in (0, 7, 999):
        pointers = table.pointers()[number]
        hashes = hash_buckets(torch.tensor([number]), table.seeds, 16)[0]
        parts = [table.clustered[16 * m + pointers[m]] + table.hashed[16 * m + hashes[m]] for m in range(2)]
        assert torch.equal(table(torch.tensor(number)), torch.cat(parts))


def test_a_fit_points_at_the_nearest_clustered_row_and_hashed_rows_are_means_of_what_is_left():
    weight, counts = make_weight(), torch.randint(1, 500, (1000,), generator=seeded(3))
    table = CCE(num_chunks=2, num_rows=16).build(1000, 8).fit(weight, counts)
    hashes = hash_buckets(torch.arange(1000), table.seeds, 16)
    for m in range(2):
        part, clustered = weight[:, 4 * m : 4 * m + 4], table.clustered.detach()[16 * m : 16 * m + 16]
        pointers = torch.cdist(part, clustered).argmin(1)
        assert torch.equal(table.pointers()[:, m], pointers)
        left = (part - clustered[pointers]).double()
        for bucket in range(16):
            taken = hashes[:, m] == bucket
            mean = (left[taken] * counts[taken, None]).sum(0) / counts[taken].sum()
            torch.testing.assert_close(table.hashed.detach()[16 * m + bucket].double(), mean, rtol=1e-4, atol=1e-5)


def test_bytes_are_packed_pointers_both_tables_and_seeds():
    assert CCE(num_chunks=4, num_rows=64).nbytes(1000, 16) == 1000 * 4 * 6 // 8 + 2 * 64 * 16 * 4 + 4 * 8
    assert CCE(num_chunks=4, num_rows=65).nbytes(1000, 16) == 1000 * 4 * 7 // 8 + 2 * 65 * 16 * 4 + 4 * 8


def test_clustering_again_keeps_what_a_table_far_larger_than_the_sample_has_learned_in_all_its_rows():
    num_embeddings = 200_000  # k-means sees 2048 of them, and they are pointed in four pieces
    table = randomize(begun(CCE(num_chunks=2, num_rows=8, cluster_steps=1), num_embeddings, 4))
    learned, seeds = table.decode(), table.seeds.clone()
    table.maintain(0)
    rows = table.decode()
    errors = [relative_error(now, before) for now, before in zip(rows.split(10_000), learned.split(10_000), strict=True)]
    # Of a part, 64 sums of 8 and 8 rows are learned and 8 centroids are left: about a fifth of the variance goes.
    assert max(errors) < 0.3
    assert max(errors) < 1.2 * min(errors)
    assert not (table.seeds == seeds).any()
    hashes = hash_buckets(torch.arange(num_embeddings), table.seeds, 8)
    left = learned[:, :2] - table.clustered.detach()[table.pointers()[:, 0]]
    for bucket in range(8):
        mean = left[hashes[:, 0] == bucket].double().mean(0)
        torch.testing.assert_close(table.hashed.detach()[bucket].double(), mean, rtol=1e-3, atol=1e-5)


def test_clustering_makes_the_optimizer_forget_all_rows():
    table = begun(CCE(num_chunks=2, num_rows=16, cluster_steps=1))
    forgotten = {id(parameter): rows.tolist() for parameter, rows in table.maintain(0)}
    assert forgotten == {id(table.clustered): list(range(32)), id(table.hashed): list(range(32))}


def test_clusterings_come_every_so_many_steps_until_their_limit():
    table = begun(CCE(num_rows=4, cluster_steps=10, num_clusterings=2))
    assert [step for step in range(60) if table.maintain(step)] == [9, 19]
    table.finish()
    assert not table.maintain(9)
    assert not CCE(num_rows=4, cluster_steps=1).build(100, 8).maintain(0)


def test_clustering_leaves_no_row_without_a_number():
    """More clustered rows than distinct rows to cluster, and hashed rows that no id hashes to."""
    table = begun(CCE(num_chunks=1, num_rows=64, cluster_steps=1), 70, 8)
    with torch.no_grad():
        table.clustered.zero_()
        table.hashed.copy_(torch.arange(64).remainder(3).unsqueeze(1).expand(64, 8))
    learned = table.decode()
    table.maintain(0)
    empty = torch.bincount(hash_buckets(torch.arange(70), table.seeds, 64)[:, 0], minlength=64) == 0
    assert empty.any()
    assert not table.hashed[empty].any()
    assert all(parameter.isfinite().all() for parameter in table.parameters())
    torch.testing.assert_close(table.decode(), learned, rtol=0, atol=1e-6)


def learn(table, target, num_steps=200):
    optimizer, draws = RowAdam(table.parameters(), lr=0.05), seeded(4)
    for step in range(num_steps):
        ids = torch.randint(len(target), (256,), generator=draws)
        (table(ids) - target[ids]).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter, rows in table.maintain(step):
            optimizer.forget(parameter, rows)
    return table


def test_training_from_scratch_finds_the_clusters_that_fixed_hashes_cannot():
    kinds = torch.randn(4, 8, generator=seeded(5))
    target = kinds[torch.randint(4, (200,), generator=seeded(6))]
    method = CCE(num_chunks=2, num_rows=32, cluster_steps=20, num_clusterings=8)
    table = learn(begun(method, 200), target)
    fixed = learn(method.build(200, 8, generator=seeded(0)), target)
    assert relative_error(table.decode(), target) < 0.1
    assert relative_error(fixed.decode(), target) > 0.5
    rows = table.decode()
    table.finish()
    assert torch.equal(table.decode(), rows)
    state = table.state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) == method.nbytes(200, 8)
    fresh = method.build(200, 8, generator=seeded(9))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.decode(), rows)


def test_a_clustering_depends_on_seed_and_state_alone():
    one, other = (randomize(begun(CCE(num_rows=16, cluster_steps=5))) for _ in range(2))
    torch.manual_seed(7)
    one.maintain(4)
    other.maintain(4)
    assert torch.equal(one.decode(), other.decode())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chunks": 3}, r"num_chunks=3 equal parts, but embedding_dim=8 is not divisible by 3\. Choose one of \[1, 2, 4, 8\]"),
        ({"num_rows": 1}, "num_rows=1. Choose 2 to 65536"),
        ({"cluster_steps": 0}, "cluster_steps=0"),
        ({"num_clusterings": -1}, "num_clusterings=-1"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CCE(**settings).build(1000, 8)
