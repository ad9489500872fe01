"""Rounding to few bits with a scale per row. Guan et al., Post-Training 4-bit Quantization on Embedding Tables, 2019, arXiv 1911.02079."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanrec.methods.base import Method
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops import fused
from leanrec.ops.packing import pack, packed_nbytes, unpack_rows
from leanrec.ops.rounding import dequantize, largest_magnitudes, least_squares_scales, quantize
from leanrec.ops.spread import Spread


@dataclass(frozen=True)
class Scalar(Method):
    """Every value is one of 2 ** num_bits evenly spread levels; each row, or group of its columns, has its own scale.

    With 8 bits the scale is the largest magnitude; with 4 and 2 it clips as much as gives the least squared error. The paper keeps a zero
    point beside the scale; on rows with a mean near zero it costs more bytes than it saves error, so the levels here are symmetric.

    Attributes:
        num_bits: 8, 4 or 2 bits per value.
        group_size: Columns that share a scale, the last group possibly fewer; 0: the whole row.
    """

    gaps: ClassVar[Mapping[str, str]] = {"scratch": "it rounds rows that are there; LowPrecision trains rounded rows"}
    knob: ClassVar[str] = "num_bits"
    num_bits: int = 8
    group_size: int = 0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [2, 4, 8]

    @property
    def streaming_gap(self) -> str | None:
        return None

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.num_bits not in (2, 4, 8):
            raise ValueError(f"Scalar has num_bits={self.num_bits}. Choose one of [2, 4, 8].")
        if self.group_size < 0:
            raise ValueError(f"Scalar has group_size={self.group_size}. Choose 0 for one scale per row, or 1 to {embedding_dim} columns per scale.")
        num_groups = -(-embedding_dim // self.columns(embedding_dim))
        return packed_nbytes(num_embeddings, embedding_dim, self.num_bits) + num_embeddings * num_groups * 2

    def columns(self, embedding_dim: int) -> int:
        """Columns that share a scale."""
        return min(self.group_size, embedding_dim) or embedding_dim

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> ScalarTable:
        self.nbytes(num_embeddings, embedding_dim)
        return ScalarTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        # Twice the rate-distortion bound is what even levels lose on Gaussian values; a scale of one's own stands for one value of a group.
        return 2 * 4.0**-self.num_bits * (1 - 1 / self.columns(spread.embedding_dim))


class ScalarTable(StreamingTable):
    """`packed_codes`: (ceil(V * D * bits / 8),) uint8. `scales`: (V, groups) float16. Both are frozen.

    Built without a fit, the codes are random.
    """

    row_parts = ("packed_codes", "scales")
    halves = ("scales",)
    method: Scalar
    packed_codes: Tensor
    scales: Tensor
    row_dtype: Tensor

    def __init__(self, method: Scalar, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        num_bytes = packed_nbytes(num_embeddings, embedding_dim, method.num_bits)
        self.columns = method.columns(embedding_dim)
        self.register_buffer("packed_codes", torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=draws))
        self.register_buffer("scales", torch.full((num_embeddings, -(-embedding_dim // self.columns)), 0.02, dtype=torch.float16))
        # Holds no value, only follows `.to(dtype)`: float16 scales alone could not tell a float32 model from a half one.
        self.register_buffer("row_dtype", torch.empty(0), persistent=False)

    @property
    def sampling(self) -> Sampling:
        return Sampling(0)

    def fit_sample(self, sample: Sample) -> None:
        """Nothing: each row has its own scale."""

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        groups = rows.split(self.columns, dim=1)
        scales = [self._choose_scales(group) for group in groups]
        codes = [quantize(group, scale, self.method.num_bits) for group, scale in zip(groups, scales, strict=True)]
        return {"packed_codes": pack(torch.cat(codes, dim=1), self.method.num_bits), "scales": torch.cat(scales, dim=1)}

    def lookup(self, ids: Tensor) -> Tensor:
        codes = unpack_rows(self.packed_codes, ids, self.embedding_dim, self.method.num_bits)
        scales = self.scales[ids].to(self.row_dtype.dtype)  # (N, groups)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.columns, dim=1)[:, : self.embedding_dim]
        return dequantize(codes, scales, self.method.num_bits)

    def coded(self) -> fused.Coded | None:
        if self.row_dtype.dtype != torch.float32:
            return None
        return fused.scaled(self.packed_codes, self.scales, self.method.num_bits, group_size=self.columns, width=self.embedding_dim)

    def _choose_scales(self, group: Tensor) -> Tensor:
        return largest_magnitudes(group) if self.method.num_bits == 8 else least_squares_scales(group, self.method.num_bits)
