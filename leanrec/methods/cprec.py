"""Block-wise adaptive decomposition of item embeddings and softmax. Sun et al., CpRec, SIGIR 2020, arXiv 2004.13139."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanrec.methods.base import Method
from leanrec.methods.blocks import BlockMethod, BlockTable


@dataclass(frozen=True)
class CpRec(BlockMethod):
    """Rows are cut by popularity into blocks of growing size and falling dimension, each with a projection of its own.

    Sizes and dimensions are geometric, as in adaptive input representations (Baevski and Auli, ICLR 2019, arXiv 1809.10853), so that the
    same settings fit tables of any size. The paper's projections have no bias; here one keeps the mean row of a block, and rows may have a
    dimension of 0, which is that row alone. The paper's softmax is `AdaptiveOutput`. Sharing layers, its other half, belongs to models that
    have layers to share.

    Attributes:
        first_dim: Dimension of the most popular block, 1 to embedding_dim.
        num_blocks: Blocks, fewer where a table has too few rows.
        dim_factor: How many times narrower each block is than the one before.
        row_factor: How many times more rows each block has than the one before.
        min_dim: Smallest dimension: 1, or 0, where the rarest rows may share one vector.
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "first_dim"
    first_dim: int = 8
    num_blocks: int = 4
    dim_factor: int = 2
    row_factor: int = 4
    min_dim: int = 1
    sorted_rows: bool = True
    weight_power: float = 0.5

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        return [
            replace(self, first_dim=dim, dim_factor=factor, min_dim=least)
            for dim in self.knob_values(num_embeddings, embedding_dim)
            for factor in (2, 4)
            for least in (0, 1)
        ]

    def widths(self, num_embeddings: int, embedding_dim: int) -> list[tuple[int, int]]:
        if not 1 <= self.first_dim <= embedding_dim:
            raise ValueError(f"CpRec has first_dim={self.first_dim}, but embedding_dim={embedding_dim}. Choose 1 to {embedding_dim}.")
        if min(self.num_blocks, self.dim_factor, self.row_factor) < 1 or self.min_dim not in (0, 1):
            raise ValueError(
                f"CpRec has num_blocks={self.num_blocks}, dim_factor={self.dim_factor}, row_factor={self.row_factor} and min_dim={self.min_dim}. "
                "Choose at least 1 of each, and min_dim 0 or 1."
            )
        parts = [self.row_factor**number for number in range(self.num_blocks)]
        ends = [num_embeddings * sum(parts[: number + 1]) // sum(parts) for number in range(self.num_blocks)]
        return [(end, max(self.min_dim, self.first_dim // self.dim_factor**number)) for number, end in enumerate(ends)]


class AdaptiveOutput(nn.Module):
    """Softmax over all rows of a table of blocks. Grave et al., ICML 2017, arXiv 1609.04309; tied to the embeddings: Baevski and Auli, 2019.

    The most popular block competes with one token for each other block; a row of another block has its token's probability times that of
    the row within the block. The table, of `CpRec` for one, may be the one that embeds the items: it is shared, not copied. A
    training step computes only the blocks that its targets lie in. Padding and unknown ids take part as any others.

    Attributes:
        table: Rows that a hidden state is compared with by inner product.
        tokens: (blocks - 1, D) float32, trainable; zero at first, which makes all tokens alike.
    """

    def __init__(self, table: BlockTable) -> None:
        super().__init__()
        self.table = table
        self.tokens = nn.Parameter(torch.zeros(len(table.shapes) - 1, table.embedding_dim))

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-probability of an id for each hidden state, whose negative mean is the loss: (N, D), (N,) int64 -> (N,)."""
        ranks, [head, *tails] = self.table.order(ids), self.table.blocks
        ends = torch.tensor([shape.last for shape in self.table.shapes], device=ids.device)
        numbers = torch.bucketize(ranks, ends, right=True)  # of the block of each id
        columns = torch.where(numbers == 0, ranks, head.shape.num_rows + numbers - 1)
        result = self._head(hidden).gather(1, columns.unsqueeze(1)).squeeze(1)
        for number, tail in enumerate(tails, start=1):
            [places] = torch.where(numbers == number)
            within = tail.scores(hidden[places]).log_softmax(1)
            result = result.index_add(0, places, within.gather(1, (ranks[places] - tail.shape.first).unsqueeze(1)).squeeze(1))
        return result

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probability of every id for each hidden state: (N, D) -> (N, V)."""
        head, first = self._head(hidden), self.table.shapes[0].last
        tails = [block.scores(hidden).log_softmax(1) + head[:, [first + number]] for number, block in enumerate(self.table.blocks[1:])]
        by_rank = torch.cat([head[:, :first], *tails], dim=1)
        return by_rank[:, self.table.order(torch.arange(self.table.num_embeddings, device=hidden.device))]

    def _head(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the rows of the first block and of the tokens of the others: (N, D) -> (N, rows + blocks - 1)."""
        return torch.cat([self.table.blocks[0].scores(hidden), hidden @ self.tokens.T], dim=1).log_softmax(1)
