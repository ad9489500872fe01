"""The hashing trick. Weinberger et al., ICML 2009, arXiv 0902.2206; several hashes: Serra and Karatzoglou, RecSys 2017, arXiv 1706.03993."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights, size_grid
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import ClusterMeans
from leanrec.ops.spread import Spread

_FIT_ROUNDS = 5


@dataclass(frozen=True)
class Hash(Method):
    """Ids are hashed to shared rows; with several hashes a row is the sum of one row from each.

    The second paper lets all hashes draw from the same rows; here each has its own part of them, so the fit is a short series of means.

    Attributes:
        num_buckets: Shared rows, divided evenly among the hashes; a table of no more rows than that is kept as it is.
        num_hashes: Rows that are summed, 1 to num_buckets.
        weight_power: A row counts as count ** weight_power in the mean of its bucket.
    """

    knob: ClassVar[str] = "num_buckets"
    num_buckets: int = 256
    num_hashes: int = 1
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return size_grid(self.num_hashes, max(self.num_hashes, num_embeddings), per_octave=1)

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        return [self.with_knob(size) for size in size_grid(self.num_hashes, max(self.num_hashes, num_embeddings), per_octave=4)]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        num_parts, num_rows = self.parts(num_embeddings)
        return num_parts * num_rows * embedding_dim * 4 + self.num_hashes * 8

    def parts(self, num_embeddings: int) -> tuple[int, int]:
        """Parts of the shared rows, one per hash, and rows of each; one part with a row per id where there are enough.

        Raises:
            ValueError: No bucket, no hash, or more hashes than buckets.
        """
        if not 1 <= self.num_hashes <= self.num_buckets:
            raise ValueError(
                f"Hash has num_buckets={self.num_buckets} and num_hashes={self.num_hashes}. "
                f"Choose at least 1 bucket, and 1 to {max(1, self.num_buckets)} hashes."
            )
        return (1, num_embeddings) if self.num_buckets >= num_embeddings else (self.num_hashes, self.num_buckets // self.num_hashes)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> HashTable:
        self.nbytes(num_embeddings, embedding_dim)
        return HashTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        num_parts, num_rows = self.parts(spread.num_embeddings)
        if num_rows == spread.num_embeddings:
            return 0.0
        # A row that makes up half of its bucket's look-ups keeps half of what sets it apart.
        own, others = spread.shares, (1 - spread.shares) / (num_parts * num_rows)
        return float((own * others / (own + others)).sum())


class HashTable(Table):
    """`rows`: (parts, rows of a part, D) float32, trainable. `seeds`: (num_hashes,) int64, frozen."""

    method: Hash
    seeds: Tensor

    def __init__(self, method: Hash, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        num_parts, num_rows = method.parts(num_embeddings)
        self.register_buffer("seeds", torch.randint(2**62, (method.num_hashes,), generator=draws))
        self.rows = nn.Parameter(torch.randn(num_parts, num_rows, embedding_dim, generator=draws) * 0.01 / num_parts**0.5)

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        parts = torch.zeros_like(self.rows, dtype=torch.float32, device=weight.device)
        # Each part in turn takes the mean of what the others leave: one round is exact for one part, a few come close for several.
        for _ in range(_FIT_ROUNDS if len(parts) > 1 else 1):
            for number in range(len(parts)):
                parts[number] = self._fit_part(weight, weights, parts, number)
        self.rows.copy_(parts)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        num_parts, num_rows, width = self.rows.shape
        first_rows = torch.arange(0, num_parts * num_rows, num_rows, device=ids.device)
        return F.embedding(self._buckets(ids) + first_rows, self.rows.view(-1, width)).sum(1)  # (N, parts, D) -> (N, D)

    def _buckets(self, ids: Tensor) -> Tensor:
        """Row of each part for each id: (N,) -> (N, parts)."""
        if self.method.num_buckets >= self.num_embeddings:
            return ids.unsqueeze(1)
        return hash_buckets(ids, self.seeds, self.rows.shape[1])

    def _fit_part(self, weight: Tensor, weights: Tensor, parts: Tensor, number: int) -> Tensor:
        """Weighted means, in the buckets of one hash, of the rows minus the other parts: (rows of a part, D)."""
        means = ClusterMeans(torch.zeros_like(parts[number]))
        for start, rows in self.row_chunks(weight):
            ids = torch.arange(start, start + len(rows), device=self.seeds.device)
            buckets = self._buckets(ids).to(rows.device)
            others = sum(parts[other][buckets[:, other]] for other in range(len(parts)) if other != number)
            means.add(rows - others, buckets[:, number], weights[start : start + len(rows)].to(rows.device))
        return means.value()
