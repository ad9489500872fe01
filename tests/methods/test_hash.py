import pytest
import torch

from leanrec.methods import Hash
from leanrec.ops.hashing import hash_buckets


def make_weight(num_embeddings=1000, embedding_dim=8):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def make_counts(num_embeddings=1000):
    return torch.randint(0, 500, (num_embeddings,), generator=torch.Generator().manual_seed(1))


def test_a_bucket_is_the_mean_of_its_rows_weighted_by_their_counts():
    weight, counts = make_weight(), make_counts()
    table = Hash(num_buckets=100).build(1000, 8).fit(weight, counts)
    buckets = hash_buckets(torch.arange(1000), table.seeds, 100).squeeze(1)
    shares = counts.float().clamp(min=0.1)
    for bucket in buckets[:20].tolist():
        taken = buckets == bucket
        mean = (weight[taken] * shares[taken, None]).sum(0) / shares[taken].sum()
        torch.testing.assert_close(table(taken.nonzero().squeeze(1)).detach(), mean.expand(int(taken.sum()), 8), rtol=1e-4, atol=1e-5)


def test_several_hashes_come_close_to_least_squares():
    weight = make_weight()
    table = Hash(num_buckets=200, num_hashes=2).build(1000, 8).fit(weight)
    buckets = hash_buckets(torch.arange(1000), table.seeds, 100)
    design = torch.nn.functional.one_hot(buckets + torch.tensor([0, 100]), 200).sum(1).double()
    solution = torch.linalg.lstsq(design, weight.double(), driver="gelsd").solution
    least = float((design @ solution - weight).square().sum())
    assert float((table.decode() - weight).square().sum()) < 1.01 * least


def test_several_hashes_tell_apart_rows_that_share_a_bucket():
    single, double = (Hash(num_buckets=128, num_hashes=hashes).build(1000, 8).decode() for hashes in (1, 2))
    assert len(single.unique(dim=0)) <= 128
    assert len(double.unique(dim=0)) > 800


def test_a_table_of_no_more_rows_than_buckets_is_kept_as_it_is():
    weight = make_weight(200)
    table = Hash(num_buckets=200).build(200, 8).fit(weight)
    assert torch.equal(table.decode(), weight)
    assert Hash(num_buckets=256).nbytes(200, 8) == table.nbytes == 200 * 8 * 4 + 8


def test_bytes_are_shared_rows_and_seeds():
    assert Hash(num_buckets=100, num_hashes=3).nbytes(1000, 8) == 3 * 33 * 8 * 4 + 3 * 8


def test_knob_values_start_with_a_row_per_hash():
    assert Hash(num_hashes=3).knob_values(40, 8) == [3, 6, 12, 24, 40]


@pytest.mark.parametrize(("num_buckets", "num_hashes"), [(0, 1), (4, 5), (4, 0)])
def test_settings_out_of_range_are_errors(num_buckets, num_hashes):
    with pytest.raises(ValueError, match=f"num_buckets={num_buckets} and num_hashes={num_hashes}"):
        Hash(num_buckets=num_buckets, num_hashes=num_hashes).build(1000, 8)
