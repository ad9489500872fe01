"""Weighted k-means. Lloyd, IEEE Trans. Information Theory 1982; start: Arthur and Vassilvitskii, k-means++, SODA 2007.

N points, D dimensions, K clusters. No function here ever holds N x K numbers at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_SCORES = 2**19  # 2 MiB of float32 stay in the cache while their maxima are taken
_POINTS_PER_CLUSTER = 256
_MAX_SAMPLE = 131_072


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    num_iters: int = 25,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Centroids that locally minimise the weighted mean squared distance to `points`.

    An empty cluster moves to one of the points that are worst represented.

    Args:
        points: (N, D) float, N at least 1.
        num_clusters: K. With no more than K distinct points these are the centroids, and the last of them is repeated.
        weights: (N,) float, not negative, or None for equal weight.
        num_iters: Lloyd iterations at most.
        tolerance: The iterations stop when one of them lowers the error by less than this share.
        generator: Source of the start, on the CPU; the same state gives the same centroids. None draws from a fixed seed.

    Returns:
        (K, D) float32 on the device of `points`.
    """
    points = points.float().contiguous()
    weights = torch.ones_like(points[:, 0]) if weights is None else weights.to(points)
    distinct = _distinct_if_few(points, num_clusters)
    if distinct is not None:
        return distinct[torch.arange(num_clusters, device=points.device).clamp(max=len(distinct) - 1)]
    centroids = _spread_start(points, weights, num_clusters, generator or torch.Generator().manual_seed(0))
    last_error = float("inf")
    for _ in range(num_iters):
        codes = nearest(points, centroids)
        errors = weights * squared_distances(points, centroids[codes])
        error = float(errors.sum())
        if error >= last_error * (1 - tolerance):
            break
        last_error = error
        means = ClusterMeans(centroids)
        means.add(points, codes, weights)
        centroids = _reseed_empty(means.value(), points, codes, errors)
    return centroids


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid: (N, D) and (K, D) float -> (N,) int64."""
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2, as one matrix product with a column for the norms
    points = F.pad(points.float(), (0, 1), value=-0.5)
    matrix = torch.cat([centroids, centroids.square().sum(1, keepdim=True)], dim=1).float().T.contiguous()
    return torch.cat([row_argmax(chunk @ matrix) for chunk in points.split(max(1, _CHUNK_SCORES // len(centroids)))])


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Squared distance of each point to the other one in its row: two (N, D) -> (N,)."""
    return (points - others).square().sum(1)


def row_argmax(scores: Tensor) -> Tensor:
    """Index of the largest of each row: (N, K) -> (N,) int64."""
    # numpy's argmax is vectorised: on a CPU it takes a fifth of the time of torch's.
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


class ClusterMeans:
    """Weighted means of the points of each cluster, gathered piece by piece; a cluster without weight keeps its start.

    Args:
        start: (K, D) float32.
    """

    def __init__(self, start: Tensor) -> None:
        self._start = start
        self._sums = torch.zeros_like(start)
        self._totals = torch.zeros_like(start[:, 0])

    def add(self, points: Tensor, codes: Tensor, weights: Tensor) -> None:
        """Counts in (N, D) points with (N,) int64 clusters and (N,) weights, all on one device with the start."""
        self._sums.index_add_(0, codes, points * weights.unsqueeze(1))
        self._totals.index_add_(0, codes, weights)

    def value(self) -> Tensor:
        """The means so far: (K, D)."""
        means = self._sums / self._totals.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        return torch.where((self._totals > 0).unsqueeze(1), means, self._start)


def sample_rows(weights: Tensor, num_clusters: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stand for all of them in `kmeans`, rising, (S,) int64, and the weight of each, (S,) float32.

    256 rows per cluster, as in faiss, are enough to place it; beyond 2**17 rows in all, at least 32 per cluster. Smaller sets are
    taken whole. Larger ones are sampled systematically: every row is drawn in proportion to its weight, a heavy one several times
    and then weighing as much, so the head of a long-tailed table is always there and no weight is left to chance.

    Args:
        weights: (N,) float on the CPU, not negative, not all 0.
        num_clusters: K.
        generator: Source of the one draw.
    """
    num_rows = max(min(_POINTS_PER_CLUSTER * num_clusters, _MAX_SAMPLE), 32 * num_clusters)
    if len(weights) <= num_rows:
        return torch.arange(len(weights)), weights.float()
    edges = weights.double().cumsum(0)
    marks = (torch.arange(num_rows, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=generator)) * (edges[-1] / num_rows)
    rows, times = torch.unique_consecutive(torch.searchsorted(edges, marks, right=True).clamp(max=len(weights) - 1), return_counts=True)
    return rows, times.float()


def _distinct_if_few(points: Tensor, limit: int) -> Tensor | None:
    """The distinct points, if there are at most `limit`; else None."""
    # One column with more distinct values than that settles it without comparing whole points, which is slow.
    if len(points) > limit and len(torch.unique(points[:, 0])) > limit:
        return None
    distinct = torch.unique(points, dim=0)
    return distinct if len(distinct) <= limit else None


def _spread_start(points: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Points drawn in proportion to weight times squared distance to those drawn before: (K, D).

    Exact k-means++ for K <= 32; beyond, K / 32 points are drawn at a time, which Lloyd's iterations make up for.
    """
    per_round = -(-num_clusters // 32)
    chosen = _draw(weights, 1, generator)
    distances = squared_distances(points, points[chosen])
    while len(chosen) < num_clusters:
        drawn = _draw(weights * distances, min(per_round, num_clusters - len(chosen)), generator)
        chosen = torch.cat([chosen, drawn])
        distances = torch.minimum(distances, squared_distances(points, points[drawn][nearest(points, points[drawn])]))
    return points[chosen]


def _draw(weights: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Indices drawn in proportion to `weights`, or evenly where all are 0: (num_draws,) int64, with repeats."""
    edges = weights.double().cumsum(0)
    if float(edges[-1]) <= 0:
        edges = torch.arange(1, len(weights) + 1, dtype=torch.float64, device=weights.device)
    marks = torch.rand(num_draws, dtype=torch.float64, generator=generator).to(edges.device) * edges[-1]
    return torch.searchsorted(edges, marks, right=True).clamp(max=len(weights) - 1)


def _reseed_empty(centroids: Tensor, points: Tensor, codes: Tensor, errors: Tensor) -> Tensor:
    """`centroids` with those of empty clusters moved to the points with the largest `errors`."""
    empty = (torch.bincount(codes, minlength=len(centroids)) == 0).nonzero().squeeze(1)
    if len(empty):
        centroids[empty] = points[errors.topk(len(empty)).indices]
    return centroids
