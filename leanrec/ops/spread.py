"""How the rows of a table spread, and how much of that a number of bits can keep.

Everything is summed chunk by chunk in float64, for tables too large to be held twice. V rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


def moments(chunks: Iterable[Tensor], counts: Tensor | None = None) -> tuple[Tensor, float]:
    """Mean row and mean squared norm of V rows, each row weighted by its count.

    Args:
        chunks: (N, D) float each, V rows in all.
        counts: (V,), or None for equal weight, which counts that are all zero give too.

    Returns:
        (D,) float64, and a number.
    """
    total, mean, square = 0.0, torch.zeros(()), torch.zeros(())
    for rows, share in _with_shares(chunks, counts):
        mean = mean.to(rows) + share @ rows
        square = square.to(rows) + share @ rows.square().sum(1)
        total += float(share.sum())
    return mean / total, float(square / total)


def variance(chunks: Iterable[Tensor], counts: Tensor | None = None) -> float:
    """Mean squared distance of rows from their mean, for arguments as `moments` takes them; 0.0 for equal rows."""
    mean, square = moments(chunks, counts)
    return _unless_rounding(square - float(mean.square().sum()), square)


def mean_and_covariance(chunks: Iterable[Tensor], counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean row and covariance of V rows, each row weighted by its count, for arguments as `moments` takes them: (D,) and (D, D) float64."""
    sums = Covariance()
    for rows, share in _with_shares(chunks, counts):
        sums.add(rows, share)
    return sums.value()


class Covariance:
    """Mean and covariance of rows that come in pieces.

    Attributes:
        total: Sum of the weights so far.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._origin, self._sum, self._products = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Count in (N, D) rows with (N,) weights, or of weight 1 each, all float64."""
        weights = torch.ones_like(rows[:, 0]) if weights is None else weights
        if self.total == 0:
            self._origin = rows.mean(0)  # products of distances from about the mean lose nothing in a difference of large numbers
        rows = rows - self._origin
        self._sum = self._sum.to(rows) + weights @ rows
        self._products = self._products.to(rows) + rows.T @ (rows * weights.unsqueeze(1))
        self.total += float(weights.sum())

    def value(self) -> tuple[Tensor, Tensor]:
        """(D,) and (D, D) float64."""
        mean = self._sum / self.total
        return mean + self._origin, self._products / self.total - mean.outer(mean)


@dataclass(frozen=True, eq=False)
class Spread:
    """What is known of a table before it is compressed, enough to foresee what a method will lose.

    Attributes:
        num_embeddings: V.
        covariance: (D, D) float64, of the rows, each weighted by its count.
        shares: (V,) float32, of each row in all look-ups, falling.
    """

    num_embeddings: int
    covariance: Tensor
    shares: Tensor
    _spectra: dict[int, list[list[float]]] = field(default_factory=dict, init=False, repr=False)
    _shares_beyond: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def measure(cls, chunks: Iterable[Tensor], num_embeddings: int, counts: Tensor | None = None) -> Spread:
        """The spread of V rows, for `chunks` and `counts` as `moments` takes them."""
        mean, covariance = mean_and_covariance(chunks, counts)
        variance = float(covariance.trace())
        if _unless_rounding(variance, variance + float(mean.square().sum())) == 0:
            covariance = torch.zeros_like(covariance)
        if counts is None or not counts.any():
            return cls(num_embeddings, covariance.cpu(), torch.full((num_embeddings,), 1 / num_embeddings))
        return cls(num_embeddings, covariance.cpu(), (counts.float() / counts.sum()).sort(descending=True).values.cpu())

    @property
    def embedding_dim(self) -> int:
        """D."""
        return len(self.covariance)

    @cached_property
    def variance(self) -> float:
        """Mean squared distance of a row from the mean row."""
        return max(0.0, float(self.covariance.trace()))

    def share_beyond(self, num_rows: int) -> float:
        """Share of the look-ups that ask for other rows than the `num_rows` most popular."""
        if num_rows not in self._shares_beyond:
            self._shares_beyond[num_rows] = min(1.0, float(self.shares[num_rows:].sum(dtype=torch.float64)))
        return self._shares_beyond[num_rows]

    def spectra(self, num_parts: int) -> list[list[float]]:
        """For each of equally wide parts of a row, its variances along its principal axes, falling."""
        if num_parts not in self._spectra:
            width = self.embedding_dim // num_parts
            blocks = [self.covariance[first : first + width, first : first + width] for first in range(0, self.embedding_dim, width)]
            self._spectra[num_parts] = [torch.linalg.eigvalsh(block).clamp(min=0).flip(0).tolist() for block in blocks]
        return self._spectra[num_parts]


def coded_variance(spectrum: Sequence[float], num_bits: float) -> float:
    """Variance that is lost when Gaussian vectors are each replaced by the nearest of 2 ** num_bits code words.

    Reverse water-filling spends the bits on the widest axes (Cover and Thomas, Elements of Information Theory, 2006, 10.3.3). That bound
    is for codes over many vectors at once; one vector at a time loses more on the axes served, by the factor of Zador (1982) with cells
    taken as balls.

    Args:
        spectrum: Variances along the principal axes, falling.
        num_bits: Bits of a code.
    """
    total = sum(spectrum)
    axes = [axis for axis in spectrum if axis > 1e-12 * total]
    if not axes:
        return 0.0
    logs = [math.log2(axis) for axis in axes]
    # The most axes whose common remainder, after all bits, is no larger than the narrowest of them.
    served = next(count for count in range(len(axes), 0, -1) if (sum(logs[:count]) - 2 * num_bits) / count <= logs[count - 1])
    level = 2 ** ((sum(logs[:served]) - 2 * num_bits) / served)
    return min(sum(axes[:served]), served * level * _ball_factor(served)) + sum(axes[served:])


def _ball_factor(width: int) -> float:
    """Squared error of the best quantizer of so many dimensions with ball-shaped cells, over the rate-distortion bound, for Gaussian vectors."""
    log_gamma = math.lgamma(width / 2 + 1)
    return 2 * math.exp(2 / width * log_gamma) / (width + 2) * ((width + 2) / width) ** ((width + 2) / 2)


def _with_shares(chunks: Iterable[Tensor], counts: Tensor | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Rows in float64, and the share of each in all counts (1 for each where there are none): (N, D), (N,)."""
    shares = None if counts is None or not counts.any() else counts.double() / counts.sum()
    start = 0
    for chunk in chunks:
        rows = chunk.double()
        share = torch.ones(len(rows)) if shares is None else shares[start : start + len(rows)]
        yield rows, share.to(rows)
        start += len(rows)


def _unless_rounding(spread: float, square: float) -> float:
    """A variance, or 0.0 where it is what float64 leaves of a difference of equals."""
    return spread if spread > 1e-12 * square else 0.0
