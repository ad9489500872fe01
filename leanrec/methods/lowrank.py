"""Principal components of the rows, weighted by their counts. Yu et al., KDD 2024, arXiv 2405.18146."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.methods.base import Method
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops.spread import Spread, mean_and_covariance

_SAMPLE_ROWS = 131_072


@dataclass(frozen=True)
class LowRank(Method):
    """A row is a mean plus `rank` coordinates times a shared basis.

    The paper takes the covariance over look-ups, which is weight_power=1; the default lets rare rows count for more. It is that of all rows,
    or of 131,072 drawn by weight, which are enough to tell axes apart that differ.

    Attributes:
        rank: Coordinates per row, 1 to embedding_dim.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "rank"
    rank: int = 4
    weight_power: float = 0.5

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return range(1, embedding_dim + 1)

    @property
    def streaming_gap(self) -> str | None:
        return None

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


class LowRankTable(StreamingTable):
    """`coordinates`: (V, rank), `basis`: (rank, D) and `mean`: (D,), float32, all trainable."""

    row_parts = ("coordinates",)
    method: LowRank

    def __init__(self, method: LowRank, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        # An orthonormal basis and these coordinates give rows the spread 0.01 of an uncompressed table.
        spread = 0.01 * (embedding_dim / method.rank) ** 0.5
        self.coordinates = nn.Parameter(torch.randn(num_embeddings, method.rank, generator=draws) * spread)
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(embedding_dim, method.rank, generator=draws))[0].T.contiguous())
        self.mean = nn.Parameter(torch.zeros(embedding_dim))

    @property
    def sampling(self) -> Sampling:
        return Sampling(_SAMPLE_ROWS)

    def fit_sample(self, sample: Sample) -> None:
        mean, covariance = mean_and_covariance([sample.rows], sample.weights)
        # eigh returns rising eigenvalues; the last columns span the largest variance.
        self.basis.copy_(torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[: self.method.rank])
        self.mean.copy_(mean)

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        return {"coordinates": (rows - self.mean.to(rows)) @ self.basis.to(rows).T}

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.coordinates, sparse=self.sparse) @ self.basis + self.mean

    def axes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return (self.coordinates, self.basis, self.mean) if self.method.rank + 1 < self.embedding_dim else None
