"""Mixed dimension embeddings. Ginart, Naumov, Mudigere, Yang and Zou, ISIT 2021, arXiv 1909.11810."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from leanrec.methods.base import Method
from leanrec.methods.blocks import BlockMethod


@dataclass(frozen=True)
class MixedDim(BlockMethod):
    """Rows are cut by popularity into blocks of equal popularity in sum; a block's dimension is its rows' mean popularity ** alpha, scaled.

    The size has to be known before the counts are, so popularity is taken to fall as 1 / rank (Zipf's law): block b ends after
    V ** (b / num_blocks) rows, and its rows' mean popularity is one over their number. The paper also takes whole tables as blocks, with
    one scale for all of a model; here `leanrec.fit_budget` divides bytes among tables. The paper's projections have no bias; here one keeps
    the mean row of a block, and rows may have a dimension of 0, which is that row alone.

    Attributes:
        base_dim: Dimension of the most popular block, 1 to embedding_dim.
        alpha: How fast dimensions fall with popularity: 0, all alike, to 1, in proportion.
        num_blocks: Blocks, fewer where a table has too few rows.
        min_dim: Smallest dimension: 1, or 0, where the rarest rows may share one vector.
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "base_dim"
    base_dim: int = 8
    alpha: float = 0.3
    num_blocks: int = 8
    min_dim: int = 1
    sorted_rows: bool = True
    weight_power: float = 0.5

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        return [
            replace(self, base_dim=dim, alpha=alpha, min_dim=least)
            for dim in self.knob_values(num_embeddings, embedding_dim)
            for alpha in (0.1, 0.2, 0.3, 0.5)
            for least in (0, 1)
        ]

    def widths(self, num_embeddings: int, embedding_dim: int) -> list[tuple[int, int]]:
        if not 1 <= self.base_dim <= embedding_dim:
            raise ValueError(f"MixedDim has base_dim={self.base_dim}, but embedding_dim={embedding_dim}. Choose 1 to {embedding_dim}.")
        if not (0 <= self.alpha <= 1 and self.num_blocks >= 1 and self.min_dim in (0, 1)):
            raise ValueError(
                f"MixedDim has alpha={self.alpha}, num_blocks={self.num_blocks} and min_dim={self.min_dim}. "
                "Choose alpha 0 to 1, at least 1 block, and min_dim 0 or 1."
            )
        ends = [round(num_embeddings ** (number / self.num_blocks)) for number in range(1, self.num_blocks + 1)]
        sizes = [last - first for first, last in pairwise([0, *ends])]
        scales = [min(1.0, ends[0] / max(1, size)) ** self.alpha for size in sizes]
        return [(end, max(self.min_dim, round(self.base_dim * scale))) for end, scale in zip(ends, scales, strict=True)]
