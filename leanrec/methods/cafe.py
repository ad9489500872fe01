"""CAFE: rows of their own for the ids that matter, shared rows for the rest. Zhang et al., SIGMOD 2024, arXiv 2312.03256."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights, size_grid
from leanrec.methods.hotsketch import HotSketch, Swaps, sketch_nbytes
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import ClusterMeans
from leanrec.ops.spread import Spread

_SCORES = ("gradient", "frequency")
_HOT_SHARES = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class CAFE(Method):
    """Hot ids have a row each, medium ids are the sum of two shared rows, cold ids are one; who is what follows the stream of look-ups.

    Made for training from scratch, where a sketch finds the ids whose gradients are largest. Where it differs from the paper: the best of
    a bucket are hot instead of those above a threshold; a hot id that is demoted leaves its vector to its shared rows instead of losing
    it; scores are normalised within the table, which has a sketch of its own; the state of the sketch is stored and counted, so training
    can go on after a load. `fit` makes the most popular rows of each bucket hot and the shared rows weighted means of the others.

    Attributes:
        num_rows: Rows, hot and shared together.
        hot_share: Share of them that is hot, between 0 and 1; half of the others answers for all other ids, half only for medium ones.
        num_slots: Slots of a bucket of the sketch, even; half of them are hot.
        score: What counts for a look-up: 'gradient', the norm of its gradient in proportion to all of the step, or 'frequency', 1.
        half_life: Training steps in which a score halves.
        medium_share: An id is medium if it scores this share of the lowest hot one in its bucket.
        weight_power: A row counts as count ** weight_power in the means of a fit.
    """

    knob: ClassVar[str] = "num_rows"
    num_rows: int = 512
    hot_share: float = 0.7
    num_slots: int = 8
    score: str = "gradient"
    half_life: int = 1000
    medium_share: float = 0.2
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return size_grid(self.num_slots + 2, max(self.num_slots + 2, num_embeddings), per_octave=1)

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        sizes = size_grid(self.num_slots + 2, max(self.num_slots + 2, num_embeddings), per_octave=4)
        return [replace(self, num_rows=size, hot_share=share) for size in sizes for share in _HOT_SHARES]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        num_buckets, _, _ = self.parts()
        return self.num_rows * embedding_dim * 4 + sketch_nbytes(num_buckets, self.num_slots) + 2 * 8

    def parts(self) -> tuple[int, int, int]:
        """Buckets of the sketch, shared rows of the first level, shared rows of the second.

        Raises:
            ValueError: A setting is out of range.
        """
        if self.num_slots < 2 or self.num_slots % 2:
            raise ValueError(f"CAFE has num_slots={self.num_slots}. Choose an even number from 2 on.")
        num_hot = self.num_slots // 2
        if self.num_rows < num_hot + 2:
            raise ValueError(f"CAFE has num_rows={self.num_rows}. Choose at least {num_hot + 2}: {num_hot} hot rows and 2 shared ones.")
        if not 0 < self.hot_share < 1:
            raise ValueError(f"CAFE has hot_share={self.hot_share}. Choose a share between 0 and 1.")
        if self.score not in _SCORES:
            raise ValueError(f"CAFE has score={self.score!r}. Choose one of {list(_SCORES)}.")
        if self.half_life < 1 or self.medium_share < 0:
            raise ValueError(
                f"CAFE has half_life={self.half_life} and medium_share={self.medium_share}. Choose at least 1 step and a share from 0 on."
            )
        num_buckets = max(1, min(int(self.num_rows * self.hot_share), self.num_rows - 2) // num_hot)
        num_shared = self.num_rows - num_buckets * num_hot
        return num_buckets, num_shared - num_shared // 2, num_shared // 2

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> CAFETable:
        self.nbytes(num_embeddings, embedding_dim)
        return CAFETable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        num_buckets, num_first, num_second = self.parts()
        shares = spread.shares.double()
        # Of the ids before it in popularity, a Poisson number shares the bucket of an id: it is hot if that is below num_slots / 2.
        rivals = torch.arange(len(shares), dtype=torch.float64) / num_buckets
        hot, held = (
            torch.special.gammaincc(torch.tensor(float(slots), dtype=torch.float64), rivals) for slots in (self.num_slots / 2, self.num_slots)
        )
        alone = _lost(shares, shares * (1 - hot), num_first)
        both = alone * _lost(shares, shares * (held - hot), num_second)
        return float((shares * ((1 - held) * alone + (held - hot) * both)).sum())


class CAFETable(Table):
    """`rows`: (num_rows, D) float32, trainable: hot ones, those of the first level, those of the second. `seeds`: (2,) int64, frozen.

    The state of the sketch is frozen too, except while training from scratch: see `HotSketch`.
    """

    method: CAFE
    seeds: Tensor

    def __init__(self, method: CAFE, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        num_buckets, self.num_first, self.num_second = method.parts()
        self.num_hot = method.num_rows - self.num_first - self.num_second
        self.sketch = HotSketch(num_buckets, method.num_slots, medium_share=method.medium_share, generator=draws)
        self.register_buffer("seeds", torch.randint(2**62, (2,), generator=draws))
        rows = torch.randn(method.num_rows, embedding_dim, generator=draws) * 0.01
        rows[-self.num_second :] = 0.0  # an id that becomes medium begins as it was
        self.rows = nn.Parameter(rows)
        self._begun = False
        self._records: list[tuple[Tensor, Tensor]] = []  # ids and scores of the look-ups of a step

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.check_weight(weight)
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        self.sketch.fill(weights)
        first = ClusterMeans(torch.zeros(self.num_first, self.embedding_dim, device=weight.device))
        for start, rows in self.row_chunks(weight):
            ids = torch.arange(start, start + len(rows), device=self.seeds.device)
            hot_rows, hot, _ = self.sketch.find(ids)
            first.add(rows, self._shared_places(ids)[:, 0].to(rows.device), (weights[start : start + len(rows)] * ~hot.cpu()).to(rows.device))
            self.rows[hot_rows[hot]] = rows[hot.to(rows.device)].to(self.rows)
        self._level(0).copy_(first.value())
        self._fit_second(weight, weights)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        hot_rows, hot, medium = self.sketch.find(ids)
        first, second = (self._shared_places(ids) + self._starts()).unbind(1)
        first = torch.where(hot, hot_rows, first)
        # The second row of an id that has none is its first one, times 0: a sparse gradient then touches no row that did not answer.
        places = torch.stack([first, torch.where(medium, second, first)], dim=1)
        one, other = F.embedding(places, self.rows, sparse=self.sparse).unbind(1)
        rows = one + other * medium.unsqueeze(1)
        if self._begun and self.training and rows.requires_grad:
            rows.register_hook(partial(self._record, ids))
        return rows

    def begin(self) -> None:
        self._begun = True

    @torch.no_grad()
    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        ids, scores = self._take_records()
        if not len(ids):
            return ()
        self.sketch.decay(0.5 ** (1 / self.method.half_life))
        swaps = self.sketch.add(ids, scores)
        self._move_rows(swaps)
        return [(self.rows, swaps.hot_slots)]

    def finish(self) -> None:
        self._begun = False
        self._records = []

    def _shared_places(self, ids: Tensor) -> Tensor:
        """Row in each of the two levels: (N,) -> (N, 2)."""
        places = [hash_buckets(ids, self.seeds[level : level + 1], num_rows) for level, num_rows in enumerate((self.num_first, self.num_second))]
        return torch.cat(places, dim=1)

    def _starts(self) -> Tensor:
        return torch.tensor([self.num_hot, self.num_hot + self.num_first], device=self.rows.device)

    def _level(self, level: int) -> Tensor:
        """The rows of one of the two levels, as a view."""
        return self.rows.detach()[self.num_hot :].split([self.num_first, self.num_second])[level]

    def _fit_second(self, weight: Tensor, weights: Tensor) -> None:
        """The second level becomes the weighted means of what the first leaves of the medium rows."""
        ids = self.sketch.ids[self.sketch.medium].long()
        first, second = self._shared_places(ids).unbind(1)
        rows = weight[ids.to(weight.device)].to(self.rows)
        means = ClusterMeans(torch.zeros_like(self._level(1)))
        means.add(rows - self._level(0)[first], second, weights.to(self.rows)[ids])
        self._level(1).copy_(means.value())

    def _record(self, ids: Tensor, gradient: Tensor) -> None:
        norms = gradient.float().norm(dim=1)
        # Padding has no gradient and is never counted.
        self._records.append((ids, norms if self.method.score == "gradient" else (norms > 0).float()))

    def _take_records(self) -> tuple[Tensor, Tensor]:
        """Ids looked up since the last step, each once, and what they scored, as much in all as there were look-ups: (N,), (N,)."""
        if not self._records:
            return self.seeds[:0], self.seeds[:0]
        ids, scores = (torch.cat(parts) for parts in zip(*self._records, strict=True))
        self._records = []
        ids, scores = ids[scores > 0], scores[scores > 0]
        distinct, places = ids.unique(return_inverse=True)
        return distinct, torch.zeros_like(scores[: len(distinct)]).index_add_(0, places, scores * (len(scores) / scores.sum()))

    def _move_rows(self, swaps: Swaps) -> None:
        """Hot rows start as what answered for their new ids; their old vectors go into the shared rows of the old ids."""
        first, second = self._shared_places(swaps.promoted).unbind(1)
        promoted = self._level(0)[first] + self._level(1)[second] * swaps.promoted_medium.unsqueeze(1)
        demoted = self.rows[swaps.hot_slots]
        self.rows[swaps.hot_slots] = promoted
        real = swaps.demoted >= 0
        self._merge_back(swaps.demoted[real], demoted[real], swaps.demoted_scores[real])

    def _merge_back(self, ids: Tensor, vectors: Tensor, scores: Tensor) -> None:
        """Shared rows become the means of themselves and of vectors that they now answer for, weighted by scores, as `fit` would have it."""
        first, second = self._shared_places(ids).unbind(1)
        medium = self.sketch.find(ids)[2]
        cold_mass, medium_mass = self.sketch.masses()
        _mix_in(self._level(0), first, vectors - self._level(1)[second] * medium.unsqueeze(1), scores, others=cold_mass / self.num_first)
        left = vectors - self._level(0)[first]
        _mix_in(self._level(1), second[medium], left[medium], scores[medium], others=medium_mass / self.num_second)


def _lost(shares: Tensor, sharing: Tensor, num_rows: int) -> Tensor:
    """Share of its variance that each id loses to those with which it shares a mean, who make up `sharing` of the look-ups: (V,), (V,) -> (V,)."""
    others = (sharing.sum() - sharing).clamp(min=0) / num_rows
    return others / (shares + others).clamp(min=torch.finfo(torch.float64).tiny)


def _mix_in(level: Tensor, places: Tensor, vectors: Tensor, scores: Tensor, *, others: Tensor) -> None:
    """Moves rows of a level towards vectors: the mean of the row, which weighs `others`, and of its vectors, which weigh their scores."""
    distinct, groups = places.unique(return_inverse=True)
    pulls = torch.zeros_like(level[distinct]).index_add_(0, groups, (vectors - level[places]) * scores.unsqueeze(1))
    totals = torch.zeros_like(pulls[:, 0]).index_add_(0, groups, scores)
    level[distinct] += pulls / (totals + others).clamp(min=torch.finfo(totals.dtype).tiny).unsqueeze(1)
