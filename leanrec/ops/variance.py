"""Spread of the rows of a table too large to be held twice: one pass, chunk by chunk, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def moments(chunks: Iterable[Tensor], counts: Tensor | None = None) -> tuple[Tensor, float]:
    """Mean row and mean squared norm of V rows, each row weighted by its count.

    Args:
        chunks: (N, D) float each, V rows in all.
        counts: (V,) int, or None for equal weight, which counts that are all zero give too.

    Returns:
        (D,) float64, and a number.
    """
    shares = None if counts is None or not counts.any() else counts.double() / counts.sum()
    start, total, mean, square = 0, 0.0, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        rows = chunk.double()
        share = torch.ones(len(rows)) if shares is None else shares[start : start + len(rows)]
        share = share.to(rows)
        mean = mean.to(rows) + share @ rows
        square = square.to(rows) + share @ rows.square().sum(1)
        total += float(share.sum())
        start += len(rows)
    return mean / total, float(square / total)


def variance(chunks: Iterable[Tensor], counts: Tensor | None = None) -> float:
    """Mean squared distance of rows from their mean, for arguments as `moments` takes them; 0.0 for equal rows."""
    mean, square = moments(chunks, counts)
    spread = square - float(mean.square().sum())
    return spread if spread > 1e-12 * square else 0.0  # below that, what float64 leaves of a difference of equals
