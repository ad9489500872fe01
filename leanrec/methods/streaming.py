"""Tables that are fitted from a sample of the rows and then one stretch of rows after another: the way to tables that do not fit into memory."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from leanrec.methods.base import Method, Table, check_counts, checked, row_weights
from leanrec.ops.sampling import systematic_sample

_COUNT_ROWS = 2**17  # at a time: what is allocated in larger pieces stays with the process


@dataclass(frozen=True)
class Sampling:
    """What a fit wants to see of a table before it encodes its rows.

    Attributes:
        num_rows: Rows to draw, in proportion to their weights; smaller tables are taken whole. 0 where rows do not depend on one another.
        even_share: Share of them that is drawn from all rows alike.
    """

    num_rows: int
    even_share: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all of a table.

    Attributes:
        ids: (S,) int64, rising.
        rows: (S, D) float32.
        weights: (S,) float32, on the CPU.
    """

    ids: Tensor
    rows: Tensor
    weights: Tensor


class StreamingTable(Table):
    """A table whose fit is three steps, none of which needs all rows at once: `fit_sample`, `encode` for each stretch of rows, `settle`.

    `fit` takes them over a tensor; `leanrec.compress_table` over files, and writes what `encode` gives to the disk. Between the first step
    and the last the table's small tensors and `gathered` are all that the fit knows, so a fit that was cut off goes on from those.

    Attributes:
        gathered: Working tensors that grow while rows are encoded; empty before and after a fit.
    """

    row_parts: ClassVar[tuple[str, ...]]
    """Names of the parameters or buffers that hold something of every row, in the order of the rows. `encode` gives them piece by piece."""

    def __init__(self, method: Method, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.gathered: dict[str, Tensor] = {}
        self._ends: Counter[str] = Counter()

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """What `fit_sample` wants to see."""

    @abstractmethod
    def fit_sample(self, sample: Sample) -> None:
        """Set all that `encode` needs, small tensors all, and make room in `gathered`."""

    @abstractmethod
    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        """What the tensors in `row_parts` hold for a stretch of rows, and counted into `gathered` what `settle` needs of them.

        Args:
            start: First row, a multiple of 8. Stretches come in the order of the rows.
            rows: (N, D) float32; N a multiple of 8 too, unless these are the last rows.
            weights: (N,) float32, on the CPU.

        Returns:
            Name -> a piece of that tensor, of any shape; the pieces of all stretches one after another are the tensor.
        """

    def settle(self) -> None:
        """Called after the last row: small tensors take their final values from `gathered`, such as centroids the means of their rows."""

    def chunk_weights(self, start: int, counts: Tensor | None, num_rows: int) -> Tensor:
        """Weights of rows in the fit, (N,) float32 on the CPU.

        Args:
            start: The first of them.
            counts: (N,) of these rows, or None.
            num_rows: N.
        """
        return row_weights(counts, num_rows, power=getattr(self.method, "weight_power", 0.0))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.check_weight(weight)
        check_counts(counts, self.num_embeddings)

        def counts_of(start: int, stop: int) -> Tensor | None:
            return None if counts is None else counts[start:stop]

        ids, weights = self.draw(counts_of)
        self.fit_sample(Sample(ids, checked(weight[ids.to(weight.device)], ids), weights))
        for start, rows in self.row_chunks(weight):
            self.keep(start, rows, self.chunk_weights(start, counts_of(start, start + len(rows)), len(rows)))
        self.settle()
        self.gathered = {}
        return self

    def disorder(self, counts: Iterable[Tensor]) -> str | None:
        """What is wrong where rows should stand by falling popularity and (N,) counts at a time say that they do not; `fit` raises it itself."""
        return None

    def draw(self, counts: Callable[[int, int], Tensor | None]) -> tuple[Tensor, Tensor]:
        """Ids and weights of the rows of a `Sample`, (S,) int64 and (S,) float32.

        Args:
            counts: Gives the counts of the rows from one to before another, or None where there are none.
        """
        sampling = self.sampling
        if sampling.num_rows == 0:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)

        def chunks() -> Iterator[Tensor]:
            for start in range(0, self.num_embeddings, _COUNT_ROWS):
                stop = min(start + _COUNT_ROWS, self.num_embeddings)
                yield self.chunk_weights(start, counts(start, stop), stop - start)

        generator = torch.Generator().manual_seed(self.seed)
        return systematic_sample(chunks, sampling.num_rows, even_share=sampling.even_share, generator=generator)

    def keep(self, start: int, rows: Tensor, weights: Tensor) -> None:
        """Store what `encode` gives for a stretch of rows in the table itself."""
        if start == 0:
            self._ends.clear()
        for name, piece in self.encode(start, rows, weights).items():
            whole, end = self.get_parameter(name) if name in self._parameters else self.get_buffer(name), self._ends[name]
            whole.data.view(-1)[end : end + piece.numel()] = piece.flatten().to(whole)
            self._ends[name] += piece.numel()
