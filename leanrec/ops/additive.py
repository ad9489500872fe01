"""Vectors as sums of code words, one from each of several code books.

Beam search: Babenko and Lempitsky, Additive Quantization, CVPR 2014, doi:10.1109/CVPR.2014.124. N points, D dimensions, L levels of K code words.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest, row_argmax, squared_distances

_CHUNK_SCORES = 2**19
_LEVEL_ITERS = 10


def sum_words(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The vectors that codes stand for: (N, L) int64, (L, K, D) -> (N, D)."""
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
        codebooks[level] = level_means([(points, codes, weights)], codebooks, level)
    return codebooks


def level_means(pieces: Iterable[tuple[Tensor, Tensor, Tensor]], codebooks: Tensor, level: int) -> Tensor:
    """The best words of one level, the other levels given: (K, D).

    Args:
        pieces: Points (N, D), their codes (N, L) and weights (N,), piece by piece.
        codebooks: (L, K, D).
        level: Which code book.
    """
    means = ClusterMeans(codebooks[level])
    for points, codes, weights in pieces:
        own = codes[:, level]
        means.add(points - sum_words(codes, codebooks) + codebooks[level, own], own, weights)
    return means.value()


def improve_codes(points: Tensor, codes: Tensor, codebooks: Tensor, *, beam_size: int) -> Tensor:
    """For each point the better of its codes and those of a beam search: (N, D), (N, L) int64, (L, K, D) -> (N, L) int64."""
    found = beam_search(points, codebooks, beam_size=beam_size)
    closer = squared_distances(points, sum_words(found, codebooks)) < squared_distances(points, sum_words(codes, codebooks))
    return torch.where(closer.unsqueeze(1), found, codes)


def beam_search(points: Tensor, codebooks: Tensor, *, beam_size: int) -> Tensor:
    """Codes with a small squared error, level by level keeping the `beam_size` best beginnings: (N, D), (L, K, D) -> (N, L) int64."""
    # A column more holds |c|^2 / 2, so that one product gives all scores.
    matrices = [torch.cat([words, words.square().sum(1, keepdim=True) / 2], dim=1).T.contiguous() for words in codebooks]
    chunk_rows = max(1, _CHUNK_SCORES // (beam_size * codebooks.shape[1]))
    return torch.cat([_search_chunk(chunk, codebooks, matrices, beam_size) for chunk in points.split(chunk_rows)])


def _search_chunk(points: Tensor, codebooks: Tensor, matrices: list[Tensor], beam_size: int) -> Tensor:
    """As `beam_search`, at one go; b beginnings are alive per point."""
    num_centroids = codebooks.shape[1]
    residuals = points.unsqueeze(1)  # (N, b, D)
    codes = torch.zeros(len(points), 1, 0, dtype=torch.int64, device=points.device)  # (N, b, levels so far)
    for level, (words, matrix) in enumerate(zip(codebooks, matrices, strict=True)):
        # argmin |r - c|^2 = argmax r.c - |c|^2 / 2 - |r|^2 / 2, over beginnings and words together
        scores = F.pad(residuals, (0, 1), value=-1.0) @ matrix - residuals.square().sum(2, keepdim=True) / 2
        best = _largest(scores.flatten(1), 1 if level == len(codebooks) - 1 else beam_size)
        begun, word = best // num_centroids, best % num_centroids
        begun = begun + torch.arange(len(points), device=points.device).unsqueeze(1) * residuals.shape[1]  # row of (N b)
        residuals = F.embedding(begun, residuals.flatten(0, 1)) - F.embedding(word, words)
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
