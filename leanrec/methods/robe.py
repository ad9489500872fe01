"""Random offset block embedding: all rows share one array. Desai, Chou and Shrivastava, MLSys 2022, arXiv 2108.02191."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import ClusterMeans
from leanrec.ops.spread import Spread, moments


@dataclass(frozen=True)
class ROBE(Method):
    """Each block of a row begins at a hashed place of one circular array of numbers, and is read from there on with a hashed sign.

    Neighbours in a block stay neighbours in memory, and two rows that share one number seldom share others. The paper keeps one array for
    all tables of a model; here each table has its own, so that tables can be compressed one by one. The mean row is stored beside the
    array, as under random signs the array can only hold what varies about zero. A fit, which the paper has not, is exact: each number is
    the weighted mean of the values that share it.

    Attributes:
        array_size: Numbers in the array; V * D or more keep the table as it is.
        block_size: Z, columns that are read in one piece; the last block of a row may be narrower.
        weight_power: A row counts as count ** weight_power in the means.
    """

    knob: ClassVar[str] = "array_size"
    array_size: int = 4096
    block_size: int = 8
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        num_values = num_embeddings * embedding_dim
        steps = range(2 * num_embeddings.bit_length())
        return sorted({min(round(embedding_dim * 2 ** (step / 2)), num_values) for step in steps} | {num_values})

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.array_size < 1:
            raise ValueError(f"ROBE has array_size={self.array_size}. Choose 1 or more; {num_embeddings * embedding_dim} keep the table as it is.")
        if self.block_size < 1:
            raise ValueError(f"ROBE has block_size={self.block_size}. Choose 1 to {embedding_dim}.")
        return (min(self.array_size, num_embeddings * embedding_dim) + embedding_dim) * 4 + 8

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> ROBETable:
        self.nbytes(num_embeddings, embedding_dim)
        return ROBETable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        if self.array_size >= spread.num_embeddings * spread.embedding_dim:
            return 0.0
        # A value that makes up half of its number's look-ups keeps half of what sets it apart.
        own = spread.shares
        others = (1 - own) * min(1.0, spread.embedding_dim / self.array_size)
        return float((own * others / (own + others).clamp(min=1e-30)).sum())


class ROBETable(Table):
    """`array`: (array_size,) and `mean`: (D,), float32, trainable. `seeds`: (1,) int64, frozen."""

    method: ROBE
    seeds: Tensor

    def __init__(self, method: ROBE, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.block_size = min(method.block_size, embedding_dim)
        self.register_buffer("seeds", torch.randint(2**62, (1,), generator=draws))
        self.array = nn.Parameter(torch.randn(min(method.array_size, num_embeddings * embedding_dim), generator=draws) * 0.01)
        self.mean = nn.Parameter(torch.zeros(embedding_dim))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        mean = moments((rows for _, rows in self.row_chunks(weight)), weights)[0].float()
        numbers = ClusterMeans(torch.zeros(len(self.array), 1, device=weight.device))
        for start, rows in self.row_chunks(weight):
            places, signs = self._places(torch.arange(start, start + len(rows), device=self.seeds.device))
            values = (rows - mean) * signs.to(rows.device)
            shares = weights[start : start + len(rows)].to(rows.device).repeat_interleave(self.embedding_dim)
            numbers.add(values.reshape(-1, 1), places.flatten().to(rows.device), shares)
        self.array.copy_(numbers.value().squeeze(1))
        self.mean.copy_(mean)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        places, signs = self._places(ids)
        values = self.array.index_select(0, places.flatten()).view(places.shape)  # a third of the time of plain indexing
        return values * signs.to(values.dtype) + self.mean

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the array each value of a row stands, and its sign: (N,) -> (N, D) int64 and (N, D) int64 of 1 and -1."""
        array_size, columns = len(self.array), torch.arange(self.embedding_dim, device=ids.device)
        if array_size == self.num_embeddings * self.embedding_dim:
            places = ids.unsqueeze(1) * self.embedding_dim + columns
            return places, torch.ones_like(places)
        num_blocks = -(-self.embedding_dim // self.block_size)
        blocks = ids.unsqueeze(1) * num_blocks + torch.arange(num_blocks, device=ids.device)  # (N, blocks)
        hashes = hash_buckets(blocks, self.seeds, 2 * array_size).squeeze(-1)  # one bit of them is the sign
        hashes = hashes[:, columns // self.block_size]  # (N, D)
        return (hashes // 2 + columns % self.block_size) % array_size, 1 - 2 * (hashes % 2)
