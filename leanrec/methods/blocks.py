"""Tables of blocks of rows, by falling popularity, each block of a width of its own: what SmallDim, MixedDim and CpRec have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.methods.order import RowOrder, order_nbytes
from leanrec.ops.spread import Covariance, Spread


@dataclass(frozen=True)
class BlockShape:
    """Rows of ranks `first` to `last` - 1, each of `width` coordinates that a projection and a bias take to the table's dimension.

    A block that a projection would not make smaller keeps its rows whole: `width` is then the table's dimension. Rows of width 0 share
    one vector, the bias.
    """

    first: int
    last: int
    width: int
    embedding_dim: int

    @classmethod
    def smallest(cls, first: int, last: int, width: int, embedding_dim: int) -> Self:
        """The shape for coordinates of this width, or for whole rows where those take no more."""
        shape = cls(first, last, width, embedding_dim)
        whole = cls(first, last, embedding_dim, embedding_dim)
        return whole if whole.nbytes <= shape.nbytes else shape

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        return self.last - self.first

    @property
    def is_projected(self) -> bool:
        """Whether rows are neither whole nor shared."""
        return 0 < self.width < self.embedding_dim

    @property
    def nbytes(self) -> int:
        """Bytes of rows, projection and bias in float32."""
        if not self.is_projected:
            return (self.num_rows if self.width else 1) * self.embedding_dim * 4
        return (self.num_rows * self.width + self.width * self.embedding_dim + self.embedding_dim) * 4

    def lost(self, spectrum: Sequence[float]) -> float:
        """Expected squared error of a row, if the rows have these variances along their principal axes (falling)."""
        # So few rows lie closer to a plane than the spread of all rows says: width + 1 of them lie in one.
        return sum(spectrum[self.width :]) * max(0.0, 1 - (self.width + 1) / self.num_rows) if self.width < self.embedding_dim else 0.0


class BlockMethod(Method):
    """A method whose table is a `BlockTable`. One that has several blocks makes `sorted_rows` a field.

    Attributes:
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    sorted_rows: bool = True
    weight_power: float

    @abstractmethod
    def widths(self, num_embeddings: int, embedding_dim: int) -> list[tuple[int, int]]:
        """For each block, the rank after its last row, and its width; blocks may be empty.

        Raises:
            ValueError: These settings do not fit a table of this shape.
        """

    def shapes(self, num_embeddings: int, embedding_dim: int) -> list[BlockShape]:
        """The blocks that hold rows."""
        cuts = [(0, 0), *self.widths(num_embeddings, embedding_dim)]
        return [BlockShape.smallest(first, last, width, embedding_dim) for (first, _), (last, width) in pairwise(cuts) if last > first]

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return range(1, embedding_dim + 1)

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        blocks = sum(shape.nbytes for shape in self.shapes(num_embeddings, embedding_dim))
        return blocks + order_nbytes(num_embeddings, sorted_rows=self.sorted_rows)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> BlockTable:
        return BlockTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        if spread.variance == 0:
            return 0.0
        [spectrum] = spread.spectra(1)
        shapes = self.shapes(spread.num_embeddings, spread.embedding_dim)
        beyond = [spread.share_beyond(shape.first) for shape in shapes] + [0.0]
        lost = sum((more - less) * shape.lost(spectrum) for shape, (more, less) in zip(shapes, pairwise(beyond), strict=True))
        return min(1.0, max(0.0, lost / spread.variance))


class Block(nn.Module):
    """`rows`: (rows, width), `projection`: (width, D) and `bias`: (D,), float32, all trainable; `rows` alone, (rows or 1, D), if not projected."""

    def __init__(self, shape: BlockShape, *, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        width, embedding_dim = shape.width or shape.embedding_dim, shape.embedding_dim
        # A projection of orthonormal rows and these coordinates give rows the spread 0.01 of an uncompressed table.
        spread = 0.01 * (embedding_dim / width) ** 0.5
        self.rows = nn.Parameter(torch.randn(shape.num_rows if shape.width else 1, width, generator=generator) * spread)
        if shape.is_projected:
            self.projection = nn.Parameter(torch.linalg.qr(torch.randn(embedding_dim, width, generator=generator))[0].T.contiguous())
            self.bias = nn.Parameter(torch.zeros(embedding_dim))

    def forward(self, ranks: Tensor, *, sparse: bool) -> Tensor:
        """Rows for ranks: (N,) -> (N, D); ranks of other blocks get some row of this one."""
        rows = F.embedding((ranks - self.shape.first).clamp(0, len(self.rows) - 1), self.rows, sparse=sparse)
        return rows @ self.projection + self.bias if self.shape.is_projected else rows

    def scores(self, hidden: Tensor) -> Tensor:
        """Inner products with all rows of the block, which are not written out: (N, D) -> (N, rows)."""
        if not self.shape.is_projected:
            return (hidden @ self.rows.T).expand(-1, self.shape.num_rows)
        return hidden @ self.projection.T @ self.rows.T + (hidden @ self.bias).unsqueeze(1)

    def set_axes(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the projection of least squared error for rows of a (D,) mean and a (D, D) covariance."""
        if self.shape.is_projected:
            # eigh returns rising eigenvalues; the last columns span the largest variance.
            self.projection.copy_(torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[: self.shape.width])
            self.bias.copy_(mean)
        elif self.shape.width == 0:
            self.rows.copy_(mean)

    def set_rows(self, ranks: Tensor, rows: Tensor) -> None:
        """Store (N, D) rows of (N,) ranks, after `set_axes`."""
        if self.shape.is_projected:
            rows = (rows - self.bias.to(rows)) @ self.projection.to(rows).T
        if self.shape.width:
            self.rows[ranks - self.shape.first] = rows.to(self.rows)


class BlockTable(Table):
    """`blocks`: as `Block`. `order`: the rank of each row, where rows are not sorted.

    A fit takes the principal components of each block's rows, weighted by their counts.
    """

    method: BlockMethod

    def __init__(self, method: BlockMethod, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.shapes = method.shapes(num_embeddings, embedding_dim)
        self.order = RowOrder(num_embeddings, sorted_rows=method.sorted_rows)
        # cast: the type of a ModuleList does not say what it holds.
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(shape, generator=draws) for shape in self.shapes))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power).double()
        if len(self.blocks) > 1:
            self.order.fit(counts)
        sums = [Covariance() for _ in self.blocks]
        for start, rows in self.row_chunks(weight):
            for number, inside, _ in self._parts(start, len(rows)):
                sums[number].add(rows[inside.to(rows.device)].double(), weights[start : start + len(rows)][inside.cpu()].to(rows.device))
        for block, total in zip(self.blocks, sums, strict=True):
            block.set_axes(*total.value())
        for start, rows in self.row_chunks(weight):
            for number, inside, ranks in self._parts(start, len(rows)):
                self.blocks[number].set_rows(ranks, rows[inside.to(rows.device)])
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        ranks = self.order(ids)
        if len(self.blocks) == 1 or torch.compiler.is_compiling():
            return self._from_all_blocks(ranks)
        rows = torch.empty(len(ids), self.embedding_dim, dtype=self.blocks[0].rows.dtype, device=ids.device)
        for shape, block in zip(self.shapes, self.blocks, strict=True):
            [places] = torch.where((ranks >= shape.first) & (ranks < shape.last))
            rows = rows.index_copy_(0, places, block(ranks[places], sparse=self.sparse))
        return rows

    def axes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        block, *more = self.blocks
        if more or not self.method.sorted_rows or not block.shape.is_projected or block.shape.width + 1 >= self.embedding_dim:
            return None
        return block.rows, block.projection, block.bias

    def _from_all_blocks(self, ranks: Tensor) -> Tensor:
        """What `lookup` answers, by a program that does not depend on the ids: each block answers for all of them."""
        rows = self.blocks[0](ranks, sparse=self.sparse)
        for shape, block in zip(self.shapes[1:], self.blocks[1:], strict=True):
            rows = torch.where((ranks >= shape.first).unsqueeze(1), block(ranks, sparse=self.sparse), rows)
        return rows

    def _parts(self, start: int, num_rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of the rows from `start` on: number of each block that has any, (num_rows,) bool which, and the ranks of those."""
        ranks = self.order(torch.arange(start, start + num_rows, device=self.blocks[0].rows.device))
        for number, shape in enumerate(self.shapes):
            inside = (ranks >= shape.first) & (ranks < shape.last)
            if inside.any():
                yield number, inside, ranks[inside]
