"""Additive codes of variable length: how many rows, the most popular first, take part in each level.

Rows are given by rank, 0 the most popular. The border of a level is the number of rows that have a code of it; borders never rise from one
level to the next, so the first `border` rows have one and nothing is stored to say which. S rows of a sample, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gains:
    """What the codes of each level take off the error of a table, summed up to each row of a sample.

    Attributes:
        ends: (S,) int64, rising: rows of the table up to the sampled one, the last being all.
        saved: (L, S) float64, error saved by a level if the rows up to there have a code of it.
        error: The error without any code.
    """

    ends: Tensor
    saved: Tensor
    error: float

    @classmethod
    def measure(cls, ranks: Tensor, errors: Tensor, weights: Tensor, num_rows: int) -> Gains:
        """From the errors (S, L + 1) float before the first and after each level of sampled rows, their ranks (S,), rising, and weights (S,)."""
        weighted = errors.double() * weights.double().unsqueeze(1)
        ends = torch.cat([ranks[1:], torch.tensor([num_rows])])
        return cls(ends, (weighted[:, :-1] - weighted[:, 1:]).T.cumsum(1), float(weighted[:, 0].sum()))

    def borders(self, price: float) -> list[int]:
        """The border of each level at which saving more costs more than it is worth.

        Args:
            price: Of a code.
        """
        borders: list[int] = []
        within = len(self.ends)
        for saved in self.saved:
            worth = saved[:within] - price * self.ends[:within]
            best = int(worth.argmax()) if within else 0
            within = best + 1 if within and float(worth[best]) > 0 else 0
            borders.append(int(self.ends[within - 1]) if within else 0)
        return borders

    def left(self, borders: Sequence[int]) -> float:
        """The error that borders leave."""
        places = [int(torch.searchsorted(self.ends, border)) for border in borders if border]
        return self.error - sum(float(saved[min(place, len(saved) - 1)]) for saved, place in zip(self.saved, places, strict=False))

    def spend(self, num_codes: int, *, num_levels: int) -> list[int]:
        """The borders with which a number of codes saves the most: the price at which they are just affordable, found by bisection.

        Codes for which there is no use go to rows and levels that are there all the same, up to `num_levels`.
        """
        low, high = 0.0, max(float((self.saved[:, 0] / self.ends[0]).max()), float(self.saved.max())) + 1e-300
        for _ in range(60):
            price = (low + high) / 2
            if sum(self.borders(price)) > num_codes:
                low = price
            else:
                high = price
        borders = self.borders(high)
        return _filled(borders + [0] * (num_levels - len(borders)), int(self.ends[-1]), num_codes)


def even_borders(num_rows: int, num_levels: int, num_codes: int) -> list[int]:
    """Borders that give every row the same number of codes, as far as that goes."""
    return _filled([0] * num_levels, num_rows, num_codes)


def _filled(borders: list[int], num_rows: int, num_codes: int) -> list[int]:
    """Borders raised, the first level first, until all codes are used."""
    left, limit, filled = num_codes - sum(borders), num_rows, []
    for border in borders:
        filled.append(min(limit, border + left))
        left -= filled[-1] - border
        limit = filled[-1]
    return filled
