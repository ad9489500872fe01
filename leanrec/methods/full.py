"""The uncompressed table, the measure of every other method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table
from leanrec.ops.spread import Spread


@dataclass(frozen=True)
class Full(Method):
    """One float32 vector per row, as `nn.Embedding` keeps it."""

    knob: ClassVar[str] = "num_bits"
    num_bits: int = 32

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [32]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.num_bits != 32:
            raise ValueError(f"Full keeps float32, so num_bits={self.num_bits} must be 32. For fewer bits use Scalar(num_bits=8).")
        return num_embeddings * embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> FullTable:
        self.nbytes(num_embeddings, embedding_dim)
        return FullTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        return 0.0


class FullTable(Table):
    """`weight`: (V, D) float32."""

    def __init__(self, method: Full, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draw = torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(self.seed))
        self.weight = nn.Parameter(draw * 0.01)

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        for start, rows in self.row_chunks(weight):
            self.weight[start : start + len(rows)] = rows.to(self.weight)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
