import torch

from leanrec.ops.hashing import hash_buckets

MASK = 2**64 - 1


def splitmix64(value):
    """The published C code in Python's integers."""
    value = value * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def test_buckets_are_those_of_splitmix64():
    ids, seeds = [0, 1, 2, 999, 2**40], [0, 7, 2**61 + 5]
    expected = []
    for one in ids:
        mixed = [splitmix64(one + seed) for seed in seeds]
        signed = [value - 2**64 if value >= 2**63 else value for value in mixed]
        expected.append([value % 1000 for value in signed])
    assert hash_buckets(torch.tensor(ids), torch.tensor(seeds), 1000).tolist() == expected


def test_consecutive_ids_spread_evenly():
    buckets = hash_buckets(torch.arange(100_000), torch.tensor([3]), 1000).squeeze(1)
    counts = torch.bincount(buckets, minlength=1000).float()
    chi_squared = float(((counts - 100) ** 2 / 100).sum())
    assert 999 - 5 * 45 < chi_squared < 999 + 5 * 45  # mean and five standard deviations of chi-squared with 999 degrees of freedom


def test_seeds_give_independent_buckets():
    one, other = hash_buckets(torch.arange(100_000), torch.tensor([3, 4_000_000_000_000]), 100).unbind(1)
    assert 0.008 < float((one == other).float().mean()) < 0.012  # 1 in 100 by chance


def test_no_ids_no_buckets():
    assert hash_buckets(torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2]), 10).shape == (0, 2)
