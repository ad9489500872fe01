"""Weighted k-means. Lloyd, IEEE Trans. Information Theory 1982; start: Arthur and Vassilvitskii, k-means++, SODA 2007.

N points, D dimensions, K clusters. No function here ever holds N x K numbers at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanrec.ops.sampling import systematic_sample

_CHUNK_SCORES = 2**19  # 2 MiB of float32 stay in the cache while their maxima are taken
_POINTS_PER_CLUSTER = 256
_MAX_SAMPLE = 131_072
_START_POINTS = 32  # per cluster, which find where centroids begin


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
    centroids = _start(points, weights, num_clusters, num_iters, tolerance, generator or torch.Generator().manual_seed(0))
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
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2
    points, centroids = points.detach().float(), centroids.detach().float()
    matrix, norms = centroids.T.contiguous(), centroids.square().sum(1) / -2
    chunk_rows = max(1, _CHUNK_SCORES // len(centroids))
    codes = torch.empty(len(points), dtype=torch.int64, device=points.device)
    # All chunks share one piece of memory: what the allocator gives anew is fetched page by page, which takes as long as the product.
    scores = torch.empty(min(chunk_rows, len(points)), len(centroids), device=points.device)
    for chunk, found in zip(points.split(chunk_rows), codes.split(chunk_rows), strict=True):
        torch.addmm(norms, chunk, matrix, out=scores[: len(chunk)])
        row_argmax(scores[: len(chunk)], out=found)
    return codes


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Squared distance of each point to the other one in its row: two (N, D) -> (N,)."""
    return (points - others).square().sum(1)


def row_argmax(scores: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Index of the largest of each row: (N, K) -> (N,) int64, new or `out`."""
    if scores.device.type == "cpu":
        # numpy's argmax is vectorised: on a CPU it takes a fifth of the time of torch's.
        return torch.from_numpy(scores.numpy().argmax(1, out=None if out is None else out.numpy()))
    return torch.argmax(scores, 1, out=out) if out is not None else scores.argmax(1)


class ClusterMeans:
    """Weighted means of the points of each cluster, gathered piece by piece; a cluster without weight keeps its start.

    Args:
        start: (K, D) float32.

    Attributes:
        sums: (K, D), of points times weight.
        totals: (K,), of weights.
    """

    def __init__(self, start: Tensor) -> None:
        self._start = start
        self.sums = torch.zeros_like(start)
        self.totals = torch.zeros_like(start[:, 0])

    def add(self, points: Tensor, codes: Tensor, weights: Tensor) -> None:
        """Counts in (N, D) points with (N,) int64 clusters and (N,) weights, all on one device with the start."""
        self.sums.index_add_(0, codes, points * weights.unsqueeze(1))
        self.totals.index_add_(0, codes, weights)

    def value(self) -> Tensor:
        """The means so far: (K, D)."""
        return cluster_means(self.sums, self.totals, self._start)


def cluster_means(sums: Tensor, totals: Tensor, start: Tensor) -> Tensor:
    """Means of clusters from the sums of their points (..., K, D) and weights (..., K); a cluster without weight keeps its start (..., K, D)."""
    totals = totals.unsqueeze(-1)
    return torch.where(totals > 0, (sums / totals.clamp(min=torch.finfo(torch.float32).tiny)).to(start), start)


def num_sample_rows(num_clusters: int) -> int:
    """Rows that are enough to place so many clusters: 256 for each, as in faiss; beyond 2**17 rows in all, at least 32 for each."""
    return max(min(_POINTS_PER_CLUSTER * num_clusters, _MAX_SAMPLE), 32 * num_clusters)


def sample_rows(weights: Tensor, num_clusters: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stand for all of them in `kmeans`, rising, (S,) int64, and the weight of each, (S,) float32; see `systematic_sample`.

    Args:
        weights: (N,) float on the CPU, not negative, not all 0.
        num_clusters: K.
        generator: Source of the one draw.
    """
    return systematic_sample(lambda: [weights], num_sample_rows(num_clusters), generator=generator)


def _distinct_if_few(points: Tensor, limit: int) -> Tensor | None:
    """The distinct points, if there are at most `limit`; else None."""
    # One column with more distinct values than that settles it without comparing whole points, which is slow.
    if len(points) > limit and len(torch.unique(points[:, 0])) > limit:
        return None
    distinct = torch.unique(points, dim=0)
    return distinct if len(distinct) <= limit else None


def _start(points: Tensor, weights: Tensor, num_clusters: int, num_iters: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """Centroids of a part of the points where there are many for each cluster, which leaves few iterations over all of them; else a spread start."""
    if len(points) < 2 * _START_POINTS * num_clusters:
        return _spread_start(points, weights, num_clusters, generator)
    rows, few = systematic_sample(lambda: [weights.cpu()], _START_POINTS * num_clusters, generator=generator)
    part = points[rows.to(points.device)]
    return kmeans(part, num_clusters, weights=few, num_iters=num_iters, tolerance=tolerance, generator=generator)


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
