"""A smaller embedding dimension with a projection: matrix factorization of the table, as in Lan et al., ALBERT, ICLR 2020, arXiv 1909.11942."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from leanrec.methods.blocks import BlockMethod


@dataclass(frozen=True)
class SmallDim(BlockMethod):
    """Rows of `small_dim` coordinates, and one projection for all of them: the plain alternative, meant to be trained from scratch.

    The paper's projection has no bias; here it has one, so that a fit to a trained table loses nothing of the mean row. The fit is that of
    `LowRank`, but a table that it would not make smaller stays whole.

    Attributes:
        small_dim: Coordinates per row, 1 to embedding_dim.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "small_dim"
    small_dim: int = 4
    weight_power: float = 0.5

    def check_counts(self, counts: Tensor | None) -> None:
        """There is one block, so the order of the rows does not matter."""

    def widths(self, num_embeddings: int, embedding_dim: int) -> list[tuple[int, int]]:
        if not 1 <= self.small_dim <= embedding_dim:
            raise ValueError(f"SmallDim has small_dim={self.small_dim}, but embedding_dim={embedding_dim}. Choose 1 to {embedding_dim}.")
        return [(num_embeddings, self.small_dim)]
