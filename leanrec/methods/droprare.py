"""One vector for all rare rows: the usual frequency cut-off, as in Cheng et al., Wide & Deep, DLRS 2016, arXiv 1606.07792."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights, size_grid
from leanrec.methods.order import RowOrder, order_nbytes
from leanrec.ops.spread import Spread


@dataclass(frozen=True)
class DropRare(Method):
    """The most popular rows are kept as they are; all others share one vector.

    The paper cuts at a count; here the number of rows is given, so that the size is known before the counts are.

    Attributes:
        num_kept: Rows kept; a table with at most one row more than that is kept whole.
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
        weight_power: A rare row counts as count ** weight_power in the shared vector.
    """

    knob: ClassVar[str] = "num_kept"
    num_kept: int = 256
    sorted_rows: bool = True
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return sorted({0, *size_grid(1, max(1, num_embeddings - 1), per_octave=1)}) if num_embeddings > 1 else [0]

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        finer = size_grid(1, max(1, num_embeddings - 1), per_octave=4)
        return [self.with_knob(size) for size in [0, *finer]] if num_embeddings > 1 else [self.with_knob(0)]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        return self.num_rows(num_embeddings) * embedding_dim * 4 + order_nbytes(num_embeddings, sorted_rows=self.sorted_rows)

    def num_rows(self, num_embeddings: int) -> int:
        """Rows that are stored, the last of them shared.

        Raises:
            ValueError: `num_kept` is negative.
        """
        if self.num_kept < 0:
            raise ValueError(f"DropRare has num_kept={self.num_kept}. Choose 0, one vector for all rows, to {num_embeddings - 1}, all rows kept.")
        return min(self.num_kept + 1, num_embeddings)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> DropRareTable:
        self.nbytes(num_embeddings, embedding_dim)
        return DropRareTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        # A single rare row is its own mean.
        num_kept = self.num_kept + 1 if self.num_kept + 1 >= spread.num_embeddings else self.num_kept
        return min(1.0, spread.share_beyond(num_kept))


class DropRareTable(Table):
    """`rows`: (num_kept + 1, D) float32, the last one shared, trainable. `order`: the rank of each row, where rows are not sorted."""

    method: DropRare

    def __init__(self, method: DropRare, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.order = RowOrder(num_embeddings, sorted_rows=method.sorted_rows)
        self.rows = nn.Parameter(torch.randn(method.num_rows(num_embeddings), embedding_dim, generator=draws) * 0.01)

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power).double()
        self.order.fit(counts)
        total, mean = 0.0, torch.zeros(self.embedding_dim, dtype=torch.float64, device=weight.device)
        for start, rows in self.row_chunks(weight):
            slots = self._slots(torch.arange(start, start + len(rows), device=self.rows.device))
            kept = slots < len(self.rows) - 1
            self.rows[slots[kept]] = rows[kept.to(rows.device)].to(self.rows)
            shares = (weights[start : start + len(rows)] * ~kept.cpu()).to(rows.device)
            mean += shares @ rows.double()
            total += float(shares.sum())
        self.rows[-1] = (mean / total).to(self.rows)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(self._slots(ids), self.rows, sparse=self.sparse)

    def _slots(self, ids: Tensor) -> Tensor:
        """Stored row of each id: (N,) -> (N,)."""
        return self.order(ids).clamp(max=len(self.rows) - 1)
