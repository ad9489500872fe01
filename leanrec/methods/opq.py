"""Optimized product quantization. Ge, He, Ke and Sun, CVPR 2013, doi:10.1109/CVPR.2013.379."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanrec.methods.pq import PQ, PQTable, parts_error
from leanrec.methods.streaming import Sample
from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest, squared_distances
from leanrec.ops.spread import Spread, mean_and_covariance

_MAX_ROUNDS = 60
_TOLERANCE = 1e-3  # the rounds stop when one of them lowers the error by less than this share


@dataclass(frozen=True)
class OPQ(PQ):
    """Product quantization of rotated rows: the parts are cut where they lose least, not where the columns happen to stand.

    Rotation and code books are improved in turn, each the best for the other, from two starts: the principal axes dealt out so that all
    parts have the same product of variances, which is optimal for Gaussian rows (the paper's parametric solution), and no rotation,
    which is PQ. The better result is kept, so that on the rows it is fitted to it never loses more than PQ; the paper takes one start.
    """

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        return super().nbytes(num_embeddings, embedding_dim) + embedding_dim * embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> OPQTable:
        self.nbytes(num_embeddings, embedding_dim)
        return OPQTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        [spectrum] = spread.spectra(1)
        parts = [[spectrum[axis] for axis in axes] for axes in allocate_axes(spectrum, self.num_subspaces)]
        num_bits = math.log2(min(self.num_centroids, spread.num_embeddings))
        rotated = spread.share_beyond(self.num_centroids) * parts_error(spread, parts, num_bits=num_bits)
        return min(super().expected_error(spread), rotated)


class OPQTable(PQTable):
    """What `PQTable` stores and `rotation`: (D, D) float32, which turns code words side by side into a row; trainable.

    Built without a fit, the rotation is none, and codes and code books are random.
    """

    method: OPQ

    def __init__(self, method: OPQ, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.rotation = nn.Parameter(torch.eye(embedding_dim))

    def fit_sample(self, sample: Sample) -> None:
        weights = sample.weights.to(sample.rows.device)
        _, covariance = mean_and_covariance([sample.rows], sample.weights)
        starts = [balanced_axes(covariance, self.method.num_subspaces).to(sample.rows), torch.eye(self.embedding_dim).to(sample.rows)]
        _, rotation, codebooks = min((self._alternate(sample.rows, weights, start) for start in starts), key=lambda result: result[0])
        self.rotation.copy_(rotation)
        self.set_codebooks(codebooks)

    def lookup(self, ids: Tensor) -> Tensor:
        return super().lookup(ids) @ self.rotation

    def coded(self) -> None:
        return None  # the kernel knows no rotation

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Parts of rows, rotated back: (N, D) -> M of (N, D / M)."""
        return super()._split(rows @ self.rotation.T.to(rows))

    def _alternate(self, sample: Tensor, weights: Tensor, rotation: Tensor) -> tuple[float, Tensor, Tensor]:
        """The paper's non-parametric solution.

        Args:
            sample: (N, D) float32.
            weights: (N,) float32.
            rotation: (D, D) to start from.

        Returns:
            Weighted squared error, rotation (D, D) and code books (M, K, D / M).
        """
        generator, num_subspaces = torch.Generator().manual_seed(self.seed), self.method.num_subspaces
        parts = (sample @ rotation.T).chunk(num_subspaces, dim=1)
        codebooks = [kmeans(part, self.num_centroids, weights=weights, generator=generator) for part in parts]
        error = math.inf
        for _ in range(_MAX_ROUNDS):
            parts = (sample @ rotation.T).chunk(num_subspaces, dim=1)
            words = []
            for subspace, part in enumerate(parts):
                codes, means = nearest(part, codebooks[subspace]), ClusterMeans(codebooks[subspace])
                means.add(part, codes, weights)
                codebooks[subspace] = means.value()
                words.append(codebooks[subspace][codes])
            joined = torch.cat(words, dim=1)
            rotation = nearest_rotation(joined, sample, weights)
            error, last_error = float(weights @ squared_distances(joined @ rotation, sample)), error
            if error >= last_error * (1 - _TOLERANCE):
                break
        return error, rotation, torch.stack(codebooks)


def allocate_axes(spectrum: Sequence[float], num_parts: int) -> list[list[int]]:
    """Axes of each part, as many for each, their products of variances as even as the paper's greedy allocation makes them.

    Args:
        spectrum: D variances, falling.
        num_parts: M, a divisor of D.
    """
    floor = max(1e-12 * spectrum[0], 1e-300)
    logs = [math.log(max(variance, floor)) for variance in spectrum]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    products = [0.0] * num_parts  # logarithms, in units of the least variance: an empty part has the smallest product
    for axis, log in enumerate(logs):
        free = [part for part in range(num_parts) if len(parts[part]) < len(spectrum) // num_parts]
        smallest = min(free, key=lambda part: products[part])
        parts[smallest].append(axis)
        products[smallest] += log - logs[-1]
    return parts


def balanced_axes(covariance: Tensor, num_parts: int) -> Tensor:
    """Principal axes in the order in which `allocate_axes` deals them out: (D, D) -> (D, D) orthonormal rows."""
    # eigh returns rising eigenvalues.
    variances, axes = torch.linalg.eigh(covariance)
    order = [axis for part in allocate_axes(variances.flip(0).tolist(), num_parts) for axis in part]
    return axes.flip(1).T[order]


def nearest_rotation(words: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The orthogonal R that minimises the weighted squared error of words @ R to rows; Schoenemann, Psychometrika 1966.

    Args:
        words: (N, D).
        rows: (N, D).
        weights: (N,).
    """
    left, _, right = torch.linalg.svd((words.T @ (rows * weights.unsqueeze(1))).double())
    return (left @ right).to(rows)
