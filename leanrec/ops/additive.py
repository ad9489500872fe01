"""Vectors as sums of code words, one from each of several code books.

Beam search: Babenko and Lempitsky, Additive Quantization, CVPR 2014, doi:10.1109/CVPR.2014.124. N points, D dimensions, L levels of K code words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanrec.ops.kmeans import ClusterMeans, cluster_means, kmeans, nearest, row_argmax, squared_distances

_CHUNK_SCORES = 2**19
_LEVEL_ITERS = 10


def sum_words(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The vectors that codes stand for: (N, L) int64, (L, K, D) -> (N, D), int64 where code words are whole numbers."""
    num_levels, num_centroids, width = codebooks.shape
    first_words = torch.arange(0, num_levels * num_centroids, num_centroids, device=codes.device)
    return F.embedding(codes + first_words, codebooks.view(-1, width)).sum(1)  # (N, L, D) -> (N, D)


def residual_codebooks(points: Tensor, num_levels: int, num_centroids: int, *, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Code books of which each is k-means on what the ones before leave, and the codes: (N, D), (N,) -> (L, K, D), (N, L) int64."""
    codebooks, codes = [], []
    for _ in range(num_levels):
        words = kmeans(points, num_centroids, weights=weights, num_iters=_LEVEL_ITERS, generator=generator)
        codes.append(nearest(points, words))
        points = points - words[codes[-1]]
        codebooks.append(words)
    return torch.stack(codebooks), torch.stack(codes, dim=1)


def update_codebooks(points: Tensor, codes: Tensor, codebooks: Tensor, *, weights: Tensor) -> Tensor:
    """Code books that lower the weighted squared error of these codes, never raise it: each in turn becomes the mean of what the others leave.

    One such round, repeated between rounds of encoding, comes as far as solving for all code books at once, which costs (L K)^3.
    """
    codebooks = codebooks.clone()
    for level in range(len(codebooks)):
        means, own = ClusterMeans(codebooks[level]), codes[:, level]
        means.add(points - sum_words(codes, codebooks) + codebooks[level, own], own, weights)
        codebooks[level] = means.value()
    return codebooks


@dataclass(frozen=True)
class NormalSums:
    """All that `update_codebooks` needs of points and codes that come in pieces, none of which is kept. Sums are float64: there may be many.

    Attributes:
        points: (L, K, D), sum of the points that have a code of a level, times their weights.
        pairs: (L K, L K), weight of the points that have both of two codes.
    """

    points: Tensor
    pairs: Tensor

    @classmethod
    def empty(cls, codebooks: Tensor) -> NormalSums:
        """Of no points yet, for code books (L, K, D)."""
        num_words = codebooks.shape[0] * codebooks.shape[1]
        return cls(torch.zeros_like(codebooks, dtype=torch.float64, requires_grad=False), codebooks.new_zeros(num_words, num_words).double())

    def tensors(self) -> dict[str, Tensor]:
        """The sums by their names."""
        return {"points": self.points, "pairs": self.pairs}

    def add(self, points: Tensor, codes: Tensor, weights: Tensor) -> None:
        """Counts in (N, D) points with (N, L) codes and (N,) weights."""
        num_levels, num_centroids, _ = self.points.shape
        for level, own in enumerate(codes.unbind(1)):
            means = ClusterMeans(torch.zeros_like(self.points[level], dtype=torch.float32, device=points.device))
            means.add(points, own, weights)
            self.points[level] += means.sums.to(self.points.device)
        pairs = self.pairs.view(num_levels, num_centroids, num_levels, num_centroids)
        for first in range(num_levels):
            for second in range(num_levels):
                both = torch.bincount(codes[:, first] * num_centroids + codes[:, second], weights, num_centroids**2)
                pairs[first, :, second] += both.view(num_centroids, num_centroids).to(pairs.device)

    def update(self, codebooks: Tensor) -> Tensor:
        """As `update_codebooks`, for all points so far: (L, K, D) -> (L, K, D)."""
        num_levels, num_centroids, width = codebooks.shape
        words = codebooks.double().clone()
        pairs = self.pairs.view(num_levels, num_centroids, num_levels, num_centroids)
        for level in range(num_levels):
            totals = pairs[level, :, level].diagonal()
            all_words = pairs[level].reshape(num_centroids, -1) @ words.view(-1, width)
            rest = self.points[level] - all_words + totals.unsqueeze(1) * words[level]
            words[level] = cluster_means(rest, totals, words[level])
        return words.to(codebooks)


def improve_codes(points: Tensor, codes: Tensor, codebooks: Tensor, *, beam_size: int) -> Tensor:
    """For each point the better of its codes and those of a beam search: (N, D), (N, L) int64, (L, K, D) -> (N, L) int64."""
    found = beam_search(points, codebooks, beam_size=beam_size)
    closer = squared_distances(points, sum_words(found, codebooks)) < squared_distances(points, sum_words(codes, codebooks))
    return torch.where(closer.unsqueeze(1), found, codes)


def beam_search(points: Tensor, codebooks: Tensor, *, beam_size: int) -> Tensor:
    """Codes with a small squared error, level by level keeping the `beam_size` best beginnings: (N, D), (L, K, D) -> (N, L) int64."""
    points, codebooks = points.detach(), codebooks.detach()
    norms, matrices = codebooks.square().sum(2) / -2, codebooks.transpose(1, 2).contiguous()  # (L, K), (L, D, K)
    chunk_rows = max(1, _CHUNK_SCORES // (beam_size * codebooks.shape[1]))
    # All chunks and levels share one piece of memory: what the allocator gives anew is fetched page by page, which takes as long as the product.
    scores = torch.empty(min(chunk_rows, len(points)) * beam_size, codebooks.shape[1], device=points.device)
    return torch.cat([_search_chunk(chunk, codebooks, norms, matrices, beam_size, scores) for chunk in points.split(chunk_rows)])


def _search_chunk(points: Tensor, codebooks: Tensor, norms: Tensor, matrices: Tensor, beam_size: int, memory: Tensor) -> Tensor:
    """As `beam_search`, at one go; b beginnings are alive per point."""
    num_centroids = codebooks.shape[1]
    residuals = points.unsqueeze(1)  # (N, b, D)
    codes = torch.zeros(len(points), 1, 0, dtype=torch.int64, device=points.device)  # (N, b, levels so far)
    for level, words in enumerate(codebooks):
        # argmin |r - c|^2 = argmax r.c - |c|^2 / 2 - |r|^2 / 2, over beginnings and words together
        flat = residuals.flatten(0, 1)
        scores = torch.addmm(norms[level], flat, matrices[level], out=memory[: len(flat)]).view(len(points), -1, num_centroids)
        scores -= residuals.square().sum(2, keepdim=True) / 2
        best = _largest(scores.flatten(1), 1 if level == len(codebooks) - 1 else beam_size)
        begun, word = best // num_centroids, best % num_centroids
        begun = begun + torch.arange(len(points), device=points.device).unsqueeze(1) * residuals.shape[1]  # row of (N b)
        residuals = F.embedding(begun, flat) - F.embedding(word, words)
        codes = torch.cat([codes.flatten(0, 1)[begun], word.unsqueeze(2)], dim=2)
    return codes[:, 0]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, falling; overwrites `scores`: (N, S) -> (N, min(count, S)) int64."""
    count = min(count, scores.shape[1])
    if scores.device.type != "cpu":
        return scores.topk(count, dim=1).indices
    # A few vectorised maxima are several times faster than topk on a CPU.
    found = []
    for _ in range(count):
        found.append(row_argmax(scores))
        scores.scatter_(1, found[-1].unsqueeze(1), float("-inf"))
    return torch.stack(found, dim=1)
