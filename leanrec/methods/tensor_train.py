"""Tensor-train table. Yin et al., TT-Rec, MLSys 2021, arXiv 2101.11714."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.spread import Spread, moments

_LEAST_START = 2.0  # standard deviations, as in the paper


@dataclass(frozen=True)
class TensorTrain(Method):
    """A row is the product of three small matrices, one for each digit of its id, plus the mean row.

    The digits i1, i2, i3 of an id have v1, v2, v3 values, with v1 v2 v3 at least V, and D is d1 d2 d3; they choose matrices of (d1, rank),
    (rank, d2 rank) and (rank, d3). The paper only trains from scratch and stores no mean. The fit here is TT-SVD (Oseledets, SIAM J. Sci.
    Comput. 2011): singular vectors of the table unfolded by the last digit, then of what they leave unfolded by the first. A row weighs in
    it as the product of its digits' shares in all weights, since weights of any other form have no such solution. Where ids are sorted, the
    first digit tells popular rows from rare ones.

    Attributes:
        rank: Inner width of the products; where fewer make an exact product, fewer are used.
        weight_power: A row counts as count ** weight_power before that.
    """

    knob: ClassVar[str] = "rank"
    rank: int = 8
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        (v1, _, v3), (d1, _, d3) = digit_sizes(num_embeddings), column_sizes(embedding_dim)
        exact = max(v1 * d1, v3 * d3)
        return sorted({min(round(2 ** (step / 2)), exact) for step in range(2 * exact.bit_length())} | {exact})

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        (v1, v2, v3), (d1, d2, d3) = digit_sizes(num_embeddings), column_sizes(embedding_dim)
        r1, r2 = self.ranks(num_embeddings, embedding_dim)
        return (v1 * d1 * r1 + v2 * r1 * d2 * r2 + v3 * r2 * d3 + embedding_dim) * 4

    def ranks(self, num_embeddings: int, embedding_dim: int) -> tuple[int, int]:
        """Inner widths between the first and the middle, and between the middle and the last matrix.

        Raises:
            ValueError: The rank is not 1 or more.
        """
        (v1, v2, v3), (d1, d2, d3) = digit_sizes(num_embeddings), column_sizes(embedding_dim)
        if self.rank < 1:
            raise ValueError(f"TensorTrain has rank={self.rank}. Choose 1 or more; {max(v1 * d1, v3 * d3)} keep a table of this shape as it is.")
        return min(self.rank, v1 * d1, v2 * d2 * v3 * d3), min(self.rank, v3 * d3, v1 * d1 * v2 * d2)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> TensorTrainTable:
        self.nbytes(num_embeddings, embedding_dim)
        return TensorTrainTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        if spread.variance == 0:
            return 0.0
        # For independent rows, the axes of an unfolding are those of its columns for each value of its digit, as wide as the digit is popular.
        digits, columns = digit_sizes(spread.num_embeddings), column_sizes(spread.embedding_dim)
        shares = F.pad(spread.shares.double(), (0, math.prod(digits) - spread.num_embeddings)).reshape(digits)
        covariance = spread.covariance.reshape(*columns, *columns)
        first_axes = shares.sum((1, 2)).outer(_variances(torch.einsum("abcdbc->ad", covariance)))
        last_axes = shares.sum((0, 1)).outer(_variances(torch.einsum("abcabd->cd", covariance)))
        ranks = self.ranks(spread.num_embeddings, spread.embedding_dim)
        kept = [float(axes.flatten().topk(rank).values.sum() / axes.sum()) for axes, rank in zip((first_axes, last_axes), ranks, strict=True)]
        return min(1.0, max(0.0, 1 - kept[0] * kept[1]))


class TensorTrainTable(Table):
    """`first`: (v1, d1, r1), `middle`: (v2, r1, d2 r2), `last`: (v3, r2, d3) and `mean`: (D,), float32, all trainable."""

    method: TensorTrain

    def __init__(self, method: TensorTrain, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.digits, self.columns = digit_sizes(num_embeddings), column_sizes(embedding_dim)
        (v1, v2, v3), (d1, d2, d3) = self.digits, self.columns
        r1, r2 = self.ranks = method.ranks(num_embeddings, embedding_dim)
        # A value is the sum of r1 r2 products of three numbers; this gives rows the spread 0.01 of an uncompressed table.
        scale = (0.01**2 / (r1 * r2)) ** (1 / 6)
        self.first = nn.Parameter(_start(v1, d1, r1, generator=draws) * scale)
        self.middle = nn.Parameter(_start(v2, r1, d2 * r2, generator=draws) * scale)
        self.last = nn.Parameter(_start(v3, r2, d3, generator=draws) * scale)
        self.mean = nn.Parameter(torch.zeros(embedding_dim))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        (v1, v2, v3), (d1, d2, d3), (r1, r2) = self.digits, self.columns, self.ranks
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        mean = moments((rows for _, rows in self.row_chunks(weight)), weights)[0].float()
        scales = [scale.to(weight.device) for scale in self._scales(weights)]
        products = torch.zeros(v3 * d3, v3 * d3, dtype=torch.float64, device=weight.device)
        for _, runs in self._runs(weight, mean, scales):
            products += runs.flatten(0, 1).T @ runs.flatten(0, 1)
        last = _widest_axes(products, r2)
        rest = torch.zeros(v1 * v2, d1 * d2, r2, device=weight.device)
        for start, runs in self._runs(weight, mean, scales):
            rest[start : start + len(runs)] = runs @ last
        rest = rest.view(v1, v2, d1, d2, r2).transpose(1, 2).reshape(v1 * d1, v2 * d2 * r2)
        first = _widest_axes((rest @ rest.T).double(), r1)
        middle = (first.T @ rest).view(r1, v2, d2 * r2).transpose(0, 1)
        self.first.copy_(first.view(v1, d1, r1) / scales[0].view(-1, 1, 1))
        self.middle.copy_(middle / scales[1].view(-1, 1, 1))
        self.last.copy_(last.view(v3, d3, r2).transpose(1, 2) / scales[2].view(-1, 1, 1))
        self.mean.copy_(mean)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        (_, v2, v3), (d1, d2, _), r2 = self.digits, self.columns, self.ranks[1]
        many = not torch.compiler.is_compiling() and ids.device.type == "cpu" and len(ids) > 4 * v2
        rows = (self._product_by_digit if many else self._product)(ids // (v2 * v3), ids // v3 % v2)  # (N, d1, d2 r2)
        rows = rows.reshape(-1, d1 * d2, r2) @ self.last[ids % v3]  # (N, d1 d2, d3)
        return rows.flatten(1) + self.mean

    def _product(self, first_ids: Tensor, middle_ids: Tensor) -> Tensor:
        return self.first[first_ids] @ self.middle[middle_ids]

    def _product_by_digit(self, first_ids: Tensor, middle_ids: Tensor) -> Tensor:
        """The same without a copy of a middle matrix for each id, which takes most of the time of a large batch."""
        order = middle_ids.argsort()
        groups = self.first[first_ids[order]].split(middle_ids.bincount(minlength=len(self.middle)).tolist())
        return torch.cat([group @ matrix for group, matrix in zip(groups, self.middle, strict=True)])[order.argsort()]

    def _scales(self, weights: Tensor) -> list[Tensor]:
        """For each digit, the root of its values' shares in all weights: (v1,), (v2,) and (v3,)."""
        shares = F.pad(weights.double() / weights.sum(dtype=torch.float64), (0, math.prod(self.digits) - self.num_embeddings)).view(self.digits)
        return [shares.sum(others).sqrt().float() for others in ((1, 2), (0, 2), (0, 1))]

    def _runs(self, weight: Tensor, mean: Tensor, scales: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Number of the first run of v3 rows, and runs less the mean and scaled, with the last columns of their rows together.

        (runs, d1 d2, v3 d3) each; rows after the last one are zero.
        """
        (_, v2, v3), (d1, d2, d3) = self.digits, self.columns
        per_chunk = max(1, 2**17 // (v3 * self.embedding_dim)) * 8
        for start, rows in self.row_chunks(weight, chunk_rows=per_chunk * v3):
            ids = torch.arange(start, start + len(rows), device=rows.device)
            scale = scales[0][ids // (v2 * v3)] * scales[1][ids // v3 % v2] * scales[2][ids % v3]
            rows = F.pad((rows - mean) * scale.unsqueeze(1), (0, 0, 0, -len(rows) % v3))
            yield start // v3, rows.view(-1, v3, d1 * d2, d3).transpose(1, 2).reshape(-1, d1 * d2, v3 * d3)


def digit_sizes(num_embeddings: int) -> tuple[int, int, int]:
    """v1, v2, v3: values of the digits of an id, the last one running fastest; nearly equal, their product at least V."""
    v3 = _ceil_root(num_embeddings, 3)
    v2 = _ceil_root(-(-num_embeddings // v3), 2)
    return -(-num_embeddings // (v2 * v3)), v2, v3


def column_sizes(embedding_dim: int) -> tuple[int, int, int]:
    """d1, d2, d3: factors of D, as equal as there are; the smallest is the middle one, whose matrices are the largest."""
    factors = [factor for factor in range(1, embedding_dim + 1) if embedding_dim % factor == 0]
    triples = [(low, mid, embedding_dim // (low * mid)) for low in factors for mid in factors if embedding_dim % (low * mid) == 0]
    low, mid, high = min(triple for triple in triples if triple == tuple(sorted(triple)) and sum(triple) == min(map(sum, triples)))
    return mid, low, high


def _ceil_root(value: int, degree: int) -> int:
    """The smallest number whose power is at least `value`."""
    root = round(value ** (1 / degree))
    return root if root**degree >= value else root + 1


def _start(*shape: int, generator: torch.Generator) -> Tensor:
    """Draws of mean 0 and variance 1 from the tails of a normal distribution.

    The paper starts so because products of three plain normal draws crowd near zero.
    """
    beyond = 0.5 * math.erfc(_LEAST_START / 2**0.5)  # share of one tail
    # Without 0, of which the quantile is infinite.
    tail = beyond * (1 - torch.rand(shape, dtype=torch.float64, generator=generator))
    signs = 1 - 2 * torch.randint(2, shape, generator=generator)
    square = 1 + _LEAST_START * math.exp(-(_LEAST_START**2) / 2) / (2 * math.pi) ** 0.5 / beyond  # mean square in the tails
    return (signs * -torch.special.ndtri(tail) / square**0.5).float()


def _widest_axes(products: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of an (N, N) float64 matrix: (N, rank) float32."""
    return torch.linalg.eigh(products).eigenvectors[:, products.shape[0] - rank :].float()


def _variances(covariance: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(covariance).clamp(min=0)
