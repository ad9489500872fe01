"""Principal components of the rows, weighted by their counts. Yu et al., KDD 2024, arXiv 2405.18146."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.spread import Spread, mean_and_covariance


@dataclass(frozen=True)
class LowRank(Method):
    """A row is a mean plus `rank` coordinates times a shared basis.

    The paper takes the covariance over look-ups, which is weight_power=1; the default lets rare rows count for more.

    Attributes:
        rank: Coordinates per row, 1 to embedding_dim.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "rank"
    rank: int = 4
    weight_power: float = 0.5

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return range(1, embedding_dim + 1)

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if not 1 <= self.rank <= embedding_dim:
            raise ValueError(f"LowRank has rank={self.rank}, but embedding_dim={embedding_dim}. Choose 1 to {embedding_dim}.")
        return (num_embeddings * self.rank + self.rank * embedding_dim + embedding_dim) * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> LowRankTable:
        self.nbytes(num_embeddings, embedding_dim)
        return LowRankTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        [spectrum] = spread.spectra(1)
        return sum(spectrum[self.rank :]) / sum(spectrum) if any(spectrum) else 0.0


class LowRankTable(Table):
    """`coordinates`: (V, rank), `basis`: (rank, D) and `mean`: (D,), float32, all trainable."""

    method: LowRank

    def __init__(self, method: LowRank, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        # An orthonormal basis and these coordinates give rows the spread 0.01 of an uncompressed table.
        spread = 0.01 * (embedding_dim / method.rank) ** 0.5
        self.coordinates = nn.Parameter(torch.randn(num_embeddings, method.rank, generator=draws) * spread)
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(embedding_dim, method.rank, generator=draws))[0].T.contiguous())
        self.mean = nn.Parameter(torch.zeros(embedding_dim))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        mean, covariance = mean_and_covariance((rows for _, rows in self.row_chunks(weight)), weights)
        # eigh returns rising eigenvalues; the last columns span the largest variance.
        basis = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[: self.method.rank].float()
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        for start, rows in self.row_chunks(weight):
            self.coordinates[start : start + len(rows)] = ((rows - mean.float()) @ basis.T).to(self.coordinates)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.coordinates, sparse=self.sparse) @ self.basis + self.mean
