"""Rows of few bits from the first step of training on, with a learned step per row. ALPT: Li et al., AAAI 2023, arXiv 2212.05735."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table
from leanrec.ops.packing import pack, unpack_rows
from leanrec.ops.rounding import dequantize, least_squares_scales, quantize
from leanrec.ops.spread import Spread


@dataclass(frozen=True)
class LowPrecision(Method):
    """Every value is one of 2 ** num_bits evenly spread levels, with one scale per row, and is so in training too.

    There is never a full-precision copy: a step takes the rows of the batch, moves them, and rounds them up or down at random such that
    the mean is right. The paper adapts rows with Adam, whose moments would take 8 bytes per value while training; here it is AdaGrad with
    one sum per row (4 bytes per row), as is usual for large tables. The paper finds the gradient of the scale by a second pass through the
    model; here that of the first pass stands in for it. The levels are those of `Scalar`, without one for zero, of which this is the trained
    sibling; a fit rounds to the scale of the least squared error.

    Attributes:
        num_bits: 8, 4 or 2 bits per value.
        learning_rate: Of rows and scales in training from scratch, whatever the rate of the optimizer.
    """

    knob: ClassVar[str] = "num_bits"
    num_bits: int = 8
    learning_rate: float = 0.05

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [2, 4, 8]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.num_bits not in (2, 4, 8):
            raise ValueError(f"LowPrecision has num_bits={self.num_bits}. Choose one of [2, 4, 8].")
        if not self.learning_rate > 0:
            raise ValueError(f"LowPrecision has learning_rate={self.learning_rate}. Choose a number above 0, such as 0.05.")
        return num_embeddings * (self.row_nbytes(embedding_dim) + 4)

    def row_nbytes(self, embedding_dim: int) -> int:
        """Bytes of the codes of a row, which begins at a whole byte so that it can be written by itself."""
        return -(-embedding_dim * self.num_bits // 8)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> LowPrecisionTable:
        self.nbytes(num_embeddings, embedding_dim)
        return LowPrecisionTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        # As for Scalar: twice the rate-distortion bound on Gaussian values; the scale stands for one value of a row.
        return 2 * 4.0**-self.num_bits * (1 - 1 / spread.embedding_dim)


class LowPrecisionTable(Table):
    """`packed_codes`: (V, bytes of a row) uint8, frozen but in training from scratch. `scales`: (V, 1) float32, trainable.

    Built without a fit, the codes are random. From `begin` to `finish` there is also `squares`: (V, 1), sums of squared gradients.
    """

    method: LowPrecision
    packed_codes: Tensor
    squares: Tensor | None

    def __init__(self, method: LowPrecision, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        shape = (num_embeddings, method.row_nbytes(embedding_dim))
        self.register_buffer("packed_codes", torch.randint(256, shape, dtype=torch.uint8, generator=draws))
        self.scales = nn.Parameter(torch.full((num_embeddings, 1), 0.02))
        self.register_buffer("squares", None)
        self._gradients: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        for start, rows in self.row_chunks(weight):
            ids = torch.arange(start, start + len(rows), device=self.scales.device)
            self._write(ids, rows.to(ids.device), least_squares_scales(rows, self.method.num_bits).to(ids.device).float())
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        if self.squares is None or not self.training:
            return dequantize(self._codes(ids), F.embedding(ids, self.scales, sparse=self.sparse), self.method.num_bits)
        # Rows are leaves of the graph: the table takes their gradients itself, and the optimizer has none.
        rows = self._read(ids).requires_grad_()
        rows.register_hook(lambda gradient: self._gradients.append((ids, gradient)))
        return rows

    def begin(self) -> None:
        self.squares = torch.zeros_like(self.scales)

    @torch.no_grad()
    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        if self._gradients:
            looked_up, gradients = (torch.cat(parts) for parts in zip(*self._gradients, strict=True))
            self._gradients.clear()
            ids, places = looked_up.unique(return_inverse=True)
            self._update(ids, torch.zeros_like(gradients[: len(ids)]).index_add_(0, places, gradients), step)
        return ()

    def finish(self) -> None:
        self.squares = None

    def _update(self, ids: Tensor, gradient: Tensor, step: int) -> None:
        """One step of AdaGrad on some rows and their scales, the rows rounded at random: distinct (N,) int64, (N, D)."""
        assert self.squares is not None
        self.squares[ids] += gradient.square().mean(1, keepdim=True)
        rates = self.method.learning_rate / self.squares[ids].sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        scales = self.scales[ids]
        rows = self._read(ids) - rates * gradient
        # The derivative of a rounded value by its scale, and the size of its steps, are those of Esser et al., 2020, arXiv 1902.08153.
        rounded = dequantize(quantize(rows, scales, self.method.num_bits), scales, self.method.num_bits)
        slopes = torch.where(rows.abs() < scales, (rounded - rows) / scales, rows.sign())
        scales = (scales - rates * (gradient * slopes).sum(1, keepdim=True) / self.embedding_dim**0.5).clamp(min=1e-6)
        noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(self.seed + step)).to(rows) - 0.5
        self._write(ids, rows + noise * (2 * scales / (2**self.method.num_bits - 1)), scales)

    def _read(self, ids: Tensor) -> Tensor:
        """Rows without gradients: (N,) -> (N, D)."""
        return dequantize(self._codes(ids), self.scales.detach()[ids], self.method.num_bits)

    def _write(self, ids: Tensor, rows: Tensor, scales: Tensor) -> None:
        """Store (N, D) rows, rounded to the nearest levels, and their (N, 1) scales."""
        codes = F.pad(quantize(rows, scales, self.method.num_bits), (0, self._codes_per_row() - self.embedding_dim))
        self.packed_codes[ids] = pack(codes, self.method.num_bits).view(len(ids), -1)
        self.scales[ids] = scales.to(self.scales)

    def _codes(self, ids: Tensor) -> Tensor:
        return unpack_rows(self.packed_codes.flatten(), ids, self._codes_per_row(), self.method.num_bits)[:, : self.embedding_dim]

    def _codes_per_row(self) -> int:
        """Codes that fill the bytes of a row: D, or a few more."""
        return self.packed_codes.shape[1] * 8 // self.method.num_bits
