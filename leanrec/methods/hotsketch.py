"""The ids that matter most in a stream. SpaceSaving: Metwally et al., ICDT 2005; in buckets: HotSketch, Zhang et al., SIGMOD 2024, arXiv 2312.03256.

W buckets of c slots; the first c / 2 slots of a bucket are hot, the ids in the others wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanrec.ops.hashing import hash_buckets

_SLOT_NBYTES = 4 + 4 + 4 + 1
_MARGIN = 1.1  # by which a waiting id must surpass a hot one: two of the same rate would change places for ever
_FEW_IDS = 65_536


class Swaps(NamedTuple):
    """Ids that took over a hot slot, and those that held it: (S,) each.

    Attributes:
        hot_slots: int64 in [0, W c / 2).
        promoted: int64 ids.
        promoted_medium: bool, whether they were medium.
        demoted: int64 ids; -1 where the slot was empty.
        demoted_scores: float, what these ids scored for certain.
    """

    hot_slots: Tensor
    promoted: Tensor
    promoted_medium: Tensor
    demoted: Tensor
    demoted_scores: Tensor


class HotSketch(nn.Module):
    """An id hashes to one bucket and is held in one of its slots or nowhere. A whole batch is taken in at once, as summaries are merged.

    Without decay, what an id scored is at most the `scores` of its slot, or the lowest score of the waiting slots if it is not held, and at
    least `certain`, what it scored since it came in. A hot id gives way when a waiting one has scored more for certain. The paper
    compares scores with a threshold, which has to be tuned for each ratio, and stores a pointer per slot; here the place of the slot
    says which row is meant.

    Attributes:
        ids: (W, c) int32, -1 where a slot is empty.
        scores: (W, c) float32.
        inherited: (W, c) float32, the part of a score that an id took over from the one it displaced.
        medium: (W, c) bool, waiting ids that score at least a share of the lowest hot one of their bucket.
        total: () float32, all scores so far.
        seed: (1,) int64, of the hash.
    """

    ids: Tensor
    scores: Tensor
    inherited: Tensor
    medium: Tensor
    total: Tensor
    seed: Tensor

    def __init__(self, num_buckets: int, num_slots: int, *, medium_share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.num_hot = num_slots // 2
        self.medium_share = medium_share
        self.register_buffer("ids", torch.full((num_buckets, num_slots), -1, dtype=torch.int32))
        self.register_buffer("scores", torch.zeros(num_buckets, num_slots))
        self.register_buffer("inherited", torch.zeros(num_buckets, num_slots))
        self.register_buffer("medium", torch.zeros(num_buckets, num_slots, dtype=torch.bool))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("seed", torch.randint(2**62, (1,), generator=generator))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number of the hot slot, whether it is that, and whether the id is medium: (N,) int64 -> (N,) int64 (any number if not hot), bool, bool."""
        buckets = self._buckets(ids)
        match = self.ids[buckets] == ids.unsqueeze(1)
        hot = match[:, : self.num_hot]
        return buckets * self.num_hot + hot.int().argmax(1), hot.any(1), (match & self.medium[buckets]).any(1)

    def fill(self, scores: Tensor) -> None:
        """Holds the ids with the largest of these scores in each bucket: (V,) float."""
        buckets = torch.cat([self._buckets(ids) for ids in torch.arange(len(scores), device=self.ids.device).split(_FEW_IDS)])
        scores = scores.to(self.scores)
        kept, ranks = _best_of_each(buckets, scores, self.ids.shape[1])
        self.ids.fill_(-1)[buckets[kept], ranks] = kept.int()
        self.scores.zero_()[buckets[kept], ranks] = scores[kept]
        self.inherited.zero_()
        self.medium.zero_()
        self.total.copy_(scores.sum())
        self._mark_medium(torch.arange(len(self.ids), device=self.ids.device))

    def decay(self, factor: float) -> None:
        """Old scores count for less."""
        for held in (self.scores, self.inherited, self.total):
            held *= factor

    def add(self, ids: Tensor, scores: Tensor) -> Swaps:
        """Takes in what distinct ids scored, then lets the best waiting id of each of their buckets become hot if it deserves it.

        Args:
            ids: (N,) int64, each once.
            scores: (N,) float, above 0.
        """
        scores = scores.to(self.scores)
        self.total += scores.sum()
        buckets = self._buckets(ids)
        match = self.ids[buckets] == ids.unsqueeze(1)
        known = match.any(1)
        self.scores[buckets[known], match[known].int().argmax(1)] += scores[known]
        self._enter(ids[~known], buckets[~known], scores[~known])
        return self._swap(buckets.unique())

    def certain(self, buckets: Tensor) -> Tensor:
        """Score of each slot since its id came in: (N,) int64 -> (N, c)."""
        return self.scores[buckets] - self.inherited[buckets]

    def masses(self) -> tuple[Tensor, Tensor]:
        """What all ids that are not hot scored, and of these the medium ones: two numbers, ()."""
        certain = self.scores - self.inherited
        return (self.total - certain[:, : self.num_hot].sum()).clamp(min=0), certain[self.medium].sum()

    def _buckets(self, ids: Tensor) -> Tensor:
        return hash_buckets(ids, self.seed, len(self.ids)).squeeze(1)

    def _enter(self, ids: Tensor, buckets: Tensor, scores: Tensor) -> None:
        """Ids not held yet compete for the waiting slots, each with what the lowest of these has on top of its own."""
        num_hot, num_waiting = self.num_hot, self.ids.shape[1] - self.num_hot
        touched = buckets.unique()
        lowest = self.scores[buckets, num_hot:].amin(1)
        rivals = torch.cat([touched.repeat_interleave(num_waiting), buckets])
        kept, ranks = _best_of_each(rivals, torch.cat([self.scores[touched, num_hot:].flatten(), lowest + scores]), num_waiting)
        entries = (self.ids, ids), (self.scores, lowest + scores), (self.inherited, lowest), (self.medium, torch.zeros_like(ids))
        for held, new in entries:
            held[rivals[kept], num_hot + ranks] = torch.cat([held[touched, num_hot:].flatten(), new.to(held.dtype)])[kept]

    def _swap(self, buckets: Tensor) -> Swaps:
        certain = self.certain(buckets)
        weakest, strongest = certain[:, : self.num_hot].min(1), certain[:, self.num_hot :].max(1)
        won = strongest.values > _MARGIN * weakest.values
        places = buckets[won], weakest.indices[won]
        others = buckets[won], strongest.indices[won] + self.num_hot
        swaps = Swaps(
            hot_slots=places[0] * self.num_hot + places[1],
            promoted=self.ids[others].long(),
            promoted_medium=self.medium[others],
            demoted=self.ids[places].long(),
            demoted_scores=weakest.values[won],
        )
        lowest = self.scores[buckets[won], self.num_hot :].amin(1)
        for held in (self.ids, self.scores, self.inherited):
            held[places], held[others] = held[others], held[places]
        # The lowest waiting score bounds what an id that is not held may have scored, so it must not fall.
        lift = (lowest - self.scores[others]).clamp(min=0)
        self.scores[others] += lift
        self.inherited[others] += lift
        self._mark_medium(buckets)
        return swaps

    def _mark_medium(self, buckets: Tensor) -> None:
        certain, num_hot = self.certain(buckets), self.num_hot
        lowest = certain[:, :num_hot].amin(1, keepdim=True)
        self.medium[buckets, num_hot:] = (certain[:, num_hot:] >= self.medium_share * lowest) & (self.ids[buckets, num_hot:] >= 0)


def sketch_nbytes(num_buckets: int, num_slots: int) -> int:
    """Bytes of a `HotSketch`."""
    return num_buckets * num_slots * _SLOT_NBYTES + 4 + 8


def _best_of_each(buckets: Tensor, scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Indices of the `limit` best of each bucket, and their ranks in it from 0 on: (N,), (N,) -> two (K,) int64; of equals the first is better."""
    order = scores.argsort(descending=True, stable=True)
    order = order[buckets[order].argsort(stable=True)]
    grouped = buckets[order]
    ranks = torch.arange(len(grouped), device=grouped.device) - torch.searchsorted(grouped, grouped)
    return order[ranks < limit], ranks[ranks < limit]
