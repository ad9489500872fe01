"""Rows of a table that stand for all of them. Systematic sampling with probability proportional to size: Madow, Ann. Math. Stat. 1949.

V rows, which come in chunks so that no number per row is kept; S rows of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def systematic_sample(
    chunks: Callable[[], Iterable[Tensor]], num_rows: int, *, even_share: float = 0.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rows drawn in proportion to their weights, rising, (S,) int64, and what each weighs in the sample, (S,) float32: the times it was drawn.

    Every row is drawn a whole number of times on either side of its share: a heavy one several times, so the head of a long-tailed table
    is always there and no weight is left to chance. A table of no more than `num_rows` rows is taken whole, with its weights.

    Args:
        chunks: Gives the weights of all rows, (N,) float at a time, not negative, not all 0; called twice.
        num_rows: Draws.
        even_share: Share of the draws that goes to all rows alike, whatever their weights; a row weighs the less the more it owes to it.
        generator: Source of where the first mark falls; None puts it in the middle of its interval.
    """
    sizes, totals = zip(*((len(weights), float(weights.double().sum())) for weights in chunks()), strict=True)
    table_rows, total = sum(sizes), sum(totals)
    if table_rows <= num_rows:
        return torch.arange(table_rows), torch.cat([part.float() for part in chunks()])
    first = 0.5 if generator is None else torch.rand((), dtype=torch.float64, generator=generator)
    marks = (torch.arange(num_rows, dtype=torch.float64) + first) / num_rows
    # Made once: small pieces kept from every chunk would stand between the large ones, and the memory of those would not be used again.
    ids, weights = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
    found, start, edge = 0, 0, 0.0
    for part in chunks():
        shares = part.double() / total
        chances = shares * (1 - even_share) + even_share / table_rows
        edges = edge + chances.cumsum(0)
        start, last, edge = start + len(part), start, float(edges[-1])
        # What rounding leaves beyond the last edge belongs to the last row.
        within = marks if start == table_rows else marks[: int(torch.searchsorted(marks, edge))]
        marks = marks[len(within) :]
        rows, times = torch.unique_consecutive(torch.searchsorted(edges, within, right=True).clamp(max=len(part) - 1), return_counts=True)
        last_found, found = found, found + len(rows)
        ids[last_found:found] = rows + last
        weights[last_found:found] = shares[rows] / chances[rows] * times
    return ids[:found].clone(), weights[:found].clone()
