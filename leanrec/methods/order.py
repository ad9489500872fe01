"""The order of a table's rows by popularity, for methods that spend more on popular rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from leanrec.ops.packing import pack, packed_nbytes, unpack_rows

_FIRST_ID = 2  # rows of padding and unknown values stand before it, however often they occur
_LEAST_SHARE = 0.9


class RowOrder(nn.Module):
    """Rank of each row: 0 is the most popular.

    Rows that are sorted already, as `leanrec prepare` numbers ids, need nothing but their number; the ranks of others are stored.

    Attributes:
        packed_ranks: (ceil(V * bits / 8),) uint8, frozen; absent where rows are sorted.
    """

    packed_ranks: Tensor

    def __init__(self, num_embeddings: int, *, sorted_rows: bool) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.sorted_rows = sorted_rows
        self.num_bits = _rank_bits(num_embeddings)
        if not sorted_rows:
            self.register_buffer("packed_ranks", pack(torch.arange(num_embeddings).unsqueeze(1), self.num_bits))

    def fit(self, counts: Tensor | None) -> None:
        """Take the order from counts, (V,) int; None leaves the rows in the order they have.

        Raises:
            ValueError: Rows that should be sorted are not.
        """
        if counts is None:
            return
        if self.sorted_rows:
            check_sorted(counts)
            return
        ranks = torch.empty(self.num_embeddings, dtype=torch.int64)
        ranks[counts.cpu().argsort(descending=True, stable=True)] = torch.arange(self.num_embeddings)
        self.packed_ranks.copy_(pack(ranks.unsqueeze(1), self.num_bits))

    def forward(self, ids: Tensor) -> Tensor:
        """Ranks of ids: (N,) int64 -> (N,) int64."""
        if self.sorted_rows:
            return ids
        return unpack_rows(self.packed_ranks, ids, 1, self.num_bits).squeeze(1)

    def row_ids(self) -> Tensor:
        """The inverse: the row of each rank, (V,) int64."""
        return self(torch.arange(self.num_embeddings)).argsort()


def check_sorted(counts: Tensor) -> None:
    """Raise ValueError where rows with counts, (V,) int, do not stand by falling popularity."""
    if finding := disorder([counts.cpu()], len(counts)):
        raise ValueError(f"{finding} Set sorted_rows=False, which stores the order.")


def disorder(counts: Iterable[Tensor], num_rows: int) -> str | None:
    """A sentence that says how the first rows are asked for much less than as many popular rows would be; None where they are not.

    Args:
        counts: Of all rows, (N,) int on the CPU at a time; what is kept of them grows with the number of different counts only.
        num_rows: V.
    """
    sizes = 2 ** torch.arange(4, max(4, max(0, num_rows - _FIRST_ID).bit_length()))
    given = torch.zeros(len(sizes), dtype=torch.float64)
    values, times = torch.empty(0), torch.empty(0)
    start = -_FIRST_ID
    for part in counts:
        real = part[max(0, -start) :].double()
        start = start + len(part)
        sums = torch.cat([torch.zeros(1), real.cumsum(0)]).double()
        given += sums[(sizes - (start - len(real))).clamp(0, len(real))]
        values, places = torch.cat([values.double(), real]).unique(return_inverse=True)
        times = torch.zeros(len(values), dtype=torch.float64).index_add_(0, places, torch.cat([times.double(), torch.ones_like(real)]))
    values, times = values.flip(0), times.flip(0)
    ends, totals = times.cumsum(0), (values * times).cumsum(0)
    for size, found in zip(sizes.tolist(), given.tolist(), strict=True):
        place = int(torch.searchsorted(ends, size))
        best = float(totals[place] - (ends[place] - size) * values[place])
        if found < _LEAST_SHARE * best:
            return (
                f"the counts do not fall with the row number: the first {size} rows make up {found:.0f} look-ups, the most popular "
                f"{size} make up {best:.0f}."
            )
    return None


def order_nbytes(num_embeddings: int, *, sorted_rows: bool) -> int:
    """Bytes of a `RowOrder`."""
    return 0 if sorted_rows else packed_nbytes(num_embeddings, 1, _rank_bits(num_embeddings))


def _rank_bits(num_embeddings: int) -> int:
    return max(1, (num_embeddings - 1).bit_length())
