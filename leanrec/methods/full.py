"""The uncompressed table, the measure of every other method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.methods.base import Method
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops.spread import Spread


@dataclass(frozen=True)
class Full(Method):
    """One float32 vector per row, as `nn.Embedding` keeps it."""

    knob: ClassVar[str] = "num_bits"
    num_bits: int = 32

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [32]

    @property
    def streaming_gap(self) -> str | None:
        return None

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.num_bits != 32:
            raise ValueError(f"Full keeps float32, so num_bits={self.num_bits} must be 32. For fewer bits use Scalar(num_bits=8).")
        return num_embeddings * embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> FullTable:
        self.nbytes(num_embeddings, embedding_dim)
        return FullTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        return 0.0


class FullTable(StreamingTable):
    """`weight`: (V, D) float32."""

    row_parts = ("weight",)

    def __init__(self, method: Full, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draw = torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(self.seed))
        self.weight = nn.Parameter(draw * 0.01)

    @property
    def sampling(self) -> Sampling:
        return Sampling(0)

    def fit_sample(self, sample: Sample) -> None:
        """Nothing: a row is kept as it is."""

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        return {"weight": rows}

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
