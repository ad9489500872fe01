"""Multi-granular quantized embeddings. Kang et al., WWW 2020, arXiv 2002.08530."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from leanrec.methods.base import Method
from leanrec.methods.dpq import DPQ, DPQTable
from leanrec.methods.order import RowOrder, order_nbytes
from leanrec.methods.pq import centroid_choices, code_bits, parts_error, used_centroids
from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest
from leanrec.ops.packing import pack, pack_at_, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread

_FIT_ROUNDS = 10


@dataclass(frozen=True)
class MGQE(DPQ):
    """DPQ with fewer centroids to choose from, and so shorter codes, for rows that are looked up less.

    Rows are grouped by popularity; all groups share the code books, and each takes the first so many centroids of them. That is one of the
    paper's two ways to spend less on rare rows; fewer parts for them would be the other.

    Attributes:
        tail_centroids: Centroids of each group but the most popular one, which has num_centroids; they must not rise.
        tail_starts: Share of the rows that are more popular than those of the group, for each of these groups; rising between 0 and 1.
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
    """

    tail_centroids: tuple[int, ...] = (64,)
    tail_starts: tuple[float, ...] = (0.1,)
    sorted_rows: bool = True

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        sizes = [(size, self._tail_of(size)) for size in centroid_choices(num_embeddings)]
        return [
            replace(self, num_subspaces=parts, num_centroids=size, tail_centroids=tail)
            for parts in self.knob_values(num_embeddings, embedding_dim)
            for size, tail in sizes
        ]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        super().nbytes(num_embeddings, embedding_dim)
        codebooks = used_centroids(self, self.num_centroids, num_embeddings) * embedding_dim * 4
        codes = sum(group.nbytes(self.num_subspaces) for group in self.groups(num_embeddings))
        return codes + codebooks + order_nbytes(num_embeddings, sorted_rows=self.sorted_rows)

    @property
    def streaming_gap(self) -> str | None:
        return "its codes stand by the popularity of rows, not in their order"

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> MGQETable:
        self.nbytes(num_embeddings, embedding_dim)
        return MGQETable(self, num_embeddings, embedding_dim, generator=generator)

    def groups(self, num_embeddings: int) -> list[Group]:
        """The groups that hold rows, the most popular one first, which is never empty.

        Raises:
            ValueError: Centroids that rise, or starts that do not, or not as many of the one as of the other.
        """
        sizes, starts = (self.num_centroids, *self.tail_centroids), (0.0, *self.tail_starts)
        if len(sizes) != len(starts) or list(sizes) != sorted(sizes, reverse=True) or not _rise_below_one(starts):
            raise ValueError(
                f"MGQE has num_centroids={self.num_centroids}, tail_centroids={self.tail_centroids} and tail_starts={self.tail_starts}. Choose "
                "centroids that do not rise, and for each of tail_centroids a start; starts rise between 0 and 1, such as (64, 16) and (0.1, 0.5)."
            )
        ranks = [math.ceil(start * num_embeddings) for start in starts]
        used = [used_centroids(self, size, num_embeddings) for size in sizes]
        groups = [Group(*each) for each in zip(ranks, [*ranks[1:], num_embeddings], used, strict=True)]
        return [group for group in groups if group.start < group.stop]

    def expected_error(self, spread: Spread) -> float:
        return min(1.0, sum(self._group_error(group, spread) for group in self.groups(spread.num_embeddings)))

    def _group_error(self, group: Group, spread: Spread) -> float:
        # Popular rows have a centroid each and lose nothing, as in PQ.
        first, last = max(group.start, group.num_centroids), max(group.stop, group.num_centroids)
        lost = parts_error(spread, spread.spectra(self.num_subspaces), num_bits=math.log2(group.num_centroids))
        return (spread.share_beyond(first) - spread.share_beyond(last)) * lost

    def _tail_of(self, num_centroids: int) -> tuple[int, ...]:
        """Centroids of the tail in the same proportion to those of the head as here."""
        return tuple(max(2, size * num_centroids // self.num_centroids) for size in self.tail_centroids)


class Group(NamedTuple):
    """Rows of neighbouring ranks of popularity, from `start` to `stop`, and how many centroids they choose from."""

    start: int
    stop: int
    num_centroids: int

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return code_bits(self.num_centroids)

    def nbytes(self, num_subspaces: int) -> int:
        """Bytes of the group's codes."""
        return packed_nbytes(self.stop - self.start, num_subspaces, self.num_bits)

    def holds(self, ranks: Tensor) -> Tensor:
        """Which ranks are in the group: (N,) -> (N,) bool."""
        return (ranks >= self.start) & (ranks < self.stop)


class MGQETable(DPQTable):
    """What `DPQTable` has; `packed_codes` holds those of one group after the other, each in the order of popularity and from a byte on.

    `order`: the rank of each row, where rows are not sorted.
    """

    method: MGQE

    def __init__(self, method: MGQE, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.order = RowOrder(num_embeddings, sorted_rows=method.sorted_rows)
        self.groups = method.groups(num_embeddings)

    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.order.fit(counts)
        return super().fit(weight, counts)

    def coded(self) -> None:
        return None  # its groups have codes of different widths

    def keep(self, start: int, rows: Tensor, weights: Tensor) -> None:
        self.set_codes(self.choose(start, rows, weights), start=start)

    def set_codes(self, codes: Tensor, *, start: int = 0) -> None:
        codes = codes.to(self.packed_codes.device)
        ranks = self.order(torch.arange(start, start + len(codes), device=codes.device))
        for group, packed in zip(self.groups, self._packed_by_group(), strict=True):
            inside = group.holds(ranks)
            pack_at_(packed, codes[inside], ranks[inside] - group.start, group.num_bits)

    def _random_codes(self, generator: torch.Generator) -> Tensor:
        groups, num_subspaces = self.method.groups(self.num_embeddings), self.method.num_subspaces
        shapes = [(group.stop - group.start, num_subspaces) for group in groups]
        codes = [torch.randint(group.num_centroids, shape, generator=generator) for group, shape in zip(groups, shapes, strict=True)]
        return torch.cat([pack(each, group.num_bits) for each, group in zip(codes, groups, strict=True)])

    def _packed_by_group(self) -> list[Tensor]:
        """Views of the packed codes."""
        return list(self.packed_codes.split([group.nbytes(self.method.num_subspaces) for group in self.groups]))

    def _codes(self, ids: Tensor) -> Tensor:
        if self.queries is not None:
            return super()._codes(ids)
        ranks = self.order(ids)
        codes = torch.zeros(1, dtype=torch.int64, device=ids.device)
        for group, packed in zip(self.groups, self._packed_by_group(), strict=True):
            places = (ranks - group.start).clamp(0, group.stop - group.start - 1)
            found = unpack_rows(packed, places, self.method.num_subspaces, group.num_bits)
            codes = torch.where(ranks.unsqueeze(1) >= group.start, found, codes)
        return codes

    def _nearest(self, part: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
        ranks = self.order(ids).to(part.device)
        codes = torch.empty_like(ranks)
        for group in self.groups:
            inside = group.holds(ranks)
            codes[inside] = nearest(part[inside], centroids[: group.num_centroids])
        return codes

    def _cluster(self, part: Tensor, ids: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Those for all rows first, then those that only more popular rows may take, then all improved together."""
        weights, stretches = weights.to(part.device), []
        for takeable, takers in self._takers(ids):
            # The sample may miss a small group without weight: its centroids can start anywhere.
            rows = takers.to(part.device) if takers.any() else slice(None)
            stretches.append(kmeans(part[rows], takeable.stop - takeable.start, weights=weights[rows], generator=generator))
        centroids = torch.cat(stretches)
        for _ in range(_FIT_ROUNDS):
            means = ClusterMeans(centroids)
            means.add(part, self._nearest(part, ids, centroids), weights)
            centroids = means.value()
        return centroids

    def _takers(self, ids: Tensor) -> list[tuple[slice, Tensor]]:
        ranks = self.order(ids)
        edges = [0, *(group.num_centroids for group in reversed(self.groups))]
        stretches = zip(edges, edges[1:], reversed(self.groups), strict=False)
        return [(slice(first, last), ranks < group.stop) for first, last, group in stretches if first < last]

    def _softmax(self, logits: Tensor, ids: Tensor) -> Tensor:
        allowed = torch.zeros_like(logits[0], dtype=torch.bool)
        for takeable, takers in self._takers(ids):
            allowed[:, takeable] = takers.unsqueeze(1)
        return logits.masked_fill(~allowed, -math.inf).softmax(2)


def _rise_below_one(starts: tuple[float, ...]) -> bool:
    """Whether each start is above the one before and the last below 1."""
    return all(first < second for first, second in pairwise((*starts, 1.0)))
