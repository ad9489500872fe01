"""Signatures of sets that agree as far as the sets do: min-wise hashing. Broder, Charikar, Frieze and Mitzenmacher, STOC 1998."""

from __future__ import annotations

import torch
from torch import Tensor

from leanrec.ops.hashing import hash_buckets

_SAMPLE_VALUES = 2**22
_CHUNK_VALUES = 2**18
_NUM_COUNTERS = 2**20
_FINE = 2**52  # steps of a hash that stands for a number from 0 to 1: no two tokens of a large set may tie


class MinHashes:
    """Hashes of the sets of tokens that ids meet in a stream, common tokens weighing less than rare ones.

    For each hash a token has an exponential variable of its own, divided by its weight, and the least of a set is the set's hash. So two
    sets have one hash with probability sum of weights of what is in both / sum of weights of what is in either: with equal weights, their
    Jaccard similarity. The weight is the inverse document frequency (Sparck Jones, 1972), log((N + 1) / n) for a token that stands in n of
    N rows, so what stands in every row says next to nothing. It is taken from the first rows of the stream and then stays, because a set's
    hash means something only beside others of the same weights; a token that comes up later is taken for one that stands in one row.

    Args:
        num_ids: V.
        seeds: (H,) int64, one per hash.
        sample_values: Tokens of which the weights are taken.
    """

    def __init__(self, num_ids: int, seeds: Tensor, *, sample_values: int = _SAMPLE_VALUES) -> None:
        self._seeds = seeds
        self._minima = torch.full((len(seeds), num_ids), torch.inf)
        self._sample_values = sample_values
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._weights: Tensor | None = None  # of tokens, by their counters

    def add(self, ids: Tensor, tokens: Tensor) -> None:
        """Count in rows of the stream: (N,) int64 in [0, V), and beside them (N, C) int64."""
        if self._weights is not None:
            self._lower(ids, tokens, self._weights)
            return
        self._sample.append((ids, tokens))
        if sum(tokens.numel() for _, tokens in self._sample) >= self._sample_values:
            self._weigh()

    def value(self) -> Tensor:
        """The hashes so far: (V, H) float32, infinite for ids that met no token."""
        if self._weights is None:
            self._weigh()
        return self._minima.T

    def _weigh(self) -> None:
        """Take the weights of tokens from the sample, and the hashes of its ids."""
        tokens = torch.cat([tokens.flatten() for _, tokens in self._sample]) if self._sample else torch.empty(0, dtype=torch.int64)
        counts = torch.bincount(_counters(tokens), minlength=_NUM_COUNTERS)
        num_rows = sum(len(ids) for ids, _ in self._sample)
        # Padding stands several times in a row.
        self._weights = ((num_rows + 1) / counts.clamp(min=1).clamp(max=max(1, num_rows))).log()
        for ids, tokens in self._sample:
            self._lower(ids, tokens, self._weights)
        self._sample.clear()

    def _lower(self, ids: Tensor, tokens: Tensor, weights: Tensor) -> None:
        """Take the minima with the tokens of some rows."""
        if not tokens.numel():
            return
        chunk_rows = max(1, _CHUNK_VALUES // tokens.shape[1])
        for some, beside in zip(ids.split(chunk_rows), tokens.split(chunk_rows), strict=True):
            own = weights[_counters(beside)].double()
            for minima, seed in zip(self._minima, self._seeds.split(1), strict=True):
                uniform = (hash_buckets(beside, seed, _FINE).squeeze(-1).double() + 0.5) / _FINE
                minima.scatter_reduce_(0, some, (-torch.log1p(-uniform) / own).amin(1).float(), "amin")


def _counters(tokens: Tensor) -> Tensor:
    """The counter of each token, which a few share: int64 of any shape -> the same shape."""
    return hash_buckets(tokens, torch.zeros(1, dtype=torch.int64), _NUM_COUNTERS).squeeze(-1)
