"""Hashing of ids into buckets. The mix is splitmix64's finalizer: Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195."""

from __future__ import annotations

from torch import Tensor

# The paper's odd multipliers as signed 64-bit numbers: torch's int64 arithmetic wraps around, as the mix wants it.
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def hash_buckets(ids: Tensor, seeds: Tensor, num_buckets: int) -> Tensor:
    """Bucket of each id under each seed, as if drawn at random: (N,) int64, (H,) int64 -> (N, H) int64 in [0, num_buckets)."""
    mixed = (ids.unsqueeze(-1) + seeds) * _GOLDEN
    mixed = (mixed ^ _shift_right(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shift_right(mixed, 27)) * _SECOND
    return (mixed ^ _shift_right(mixed, 31)).remainder(num_buckets)


def _shift_right(values: Tensor, steps: int) -> Tensor:
    """Logical shift: torch's own one copies the sign."""
    return values >> steps & (1 << 64 - steps) - 1
