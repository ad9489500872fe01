"""Product quantization. Jegou, Douze and Schmid, TPAMI 2011, doi:10.1109/TPAMI.2010.57."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.methods.base import Method
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops import fused
from leanrec.ops.kmeans import ClusterMeans, cluster_means, kmeans, nearest, num_sample_rows
from leanrec.ops.packing import pack, pack_rows_, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread, coded_variance

MAX_BITS = 16


@dataclass(frozen=True)
class PQ(Method):
    """A row is cut into equal parts, and each part is the nearest of the centroids of its subspace.

    The paper weighs all vectors alike; here a row weighs as a power of its count, because a recommender looks up few rows very often.

    Attributes:
        num_subspaces: M, parts per row; divides embedding_dim.
        num_centroids: K, 2 to 65536; a table of fewer rows has one centroid per row.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    gaps: ClassVar[Mapping[str, str]] = {
        "scratch": "its codes come from rows that are there, and would stay random; DPQ learns codes with the click loss"
    }
    knob: ClassVar[str] = "num_subspaces"
    num_subspaces: int = 4
    num_centroids: int = 256
    weight_power: float = 0.5

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [parts for parts in range(1, embedding_dim + 1) if embedding_dim % parts == 0]

    @property
    def streaming_gap(self) -> str | None:
        return None

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        sizes = centroid_choices(num_embeddings)
        return [replace(self, num_subspaces=parts, num_centroids=size) for parts in self.knob_values(num_embeddings, embedding_dim) for size in sizes]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        choices = self.knob_values(num_embeddings, embedding_dim)
        if self.num_subspaces not in choices:
            raise ValueError(
                f"{type(self).__name__} splits a row into num_subspaces={self.num_subspaces} equal parts, but embedding_dim={embedding_dim} "
                f"is not divisible by {self.num_subspaces}. Choose one of {choices}."
            )
        num_centroids = used_centroids(self, self.num_centroids, num_embeddings)
        return packed_nbytes(num_embeddings, self.num_subspaces, code_bits(num_centroids)) + num_centroids * embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> PQTable:
        self.nbytes(num_embeddings, embedding_dim)
        return PQTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        return coding_error(spread, num_subspaces=self.num_subspaces, num_levels=1, num_centroids=self.num_centroids)


class PQTable(StreamingTable):
    """`packed_codes`: (ceil(V * M * bits / 8),) uint8, frozen. `codebooks`: (M, K, D / M) float32, trainable.

    Built without a fit, codes and code books are random.
    """

    row_parts = ("packed_codes",)
    method: PQ
    packed_codes: Tensor

    def __init__(self, method: PQ, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.num_centroids = used_centroids(method, method.num_centroids, num_embeddings)
        self.num_bits = code_bits(self.num_centroids)
        draws = torch.Generator().manual_seed(self.seed)
        width = embedding_dim // method.num_subspaces
        self.codebooks = nn.Parameter(torch.randn(method.num_subspaces, self.num_centroids, width, generator=draws) * 0.01)
        self.register_buffer("packed_codes", self._random_codes(draws))

    @property
    def sampling(self) -> Sampling:
        return Sampling(num_sample_rows(self.num_centroids))

    def fit_sample(self, sample: Sample) -> None:
        generator, ids = torch.Generator().manual_seed(self.seed), sample.ids.to(self.codebooks.device)
        self.set_codebooks(torch.stack([self._cluster(part, ids, sample.weights, generator) for part in self._split(sample.rows)]))

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        return {"packed_codes": pack(self.choose(start, rows, weights), self.num_bits)}

    def settle(self) -> None:
        self.codebooks.copy_(cluster_means(self.gathered["sums"], self.gathered["totals"], self.codebooks))

    def lookup(self, ids: Tensor) -> Tensor:
        return self._words(self._codes(ids))

    def coded(self) -> fused.Coded | None:
        return fused.concat(self.held("packed_codes"), self.held("codebooks"), self.num_bits, self.embedding_dim)

    def codes(self) -> Tensor:
        """The centroid of each part of each row: (V, M) int64."""
        return self._codes(torch.arange(self.num_embeddings, device=self.packed_codes.device))

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Take (M, K, D / M) centroids to encode with, and make room to gather the means of their rows, in float64 as they may be many."""
        self.codebooks.copy_(codebooks)
        sums = torch.zeros_like(self.codebooks, dtype=torch.float64, requires_grad=False)
        self.gathered = {"sums": sums, "totals": torch.zeros_like(sums[..., 0])}

    def choose(self, start: int, rows: Tensor, weights: Tensor) -> Tensor:
        """Codes of (N, D) rows from `start` on, which weigh (N,), gathered for `settle`: (N, M) int64."""
        ids = torch.arange(start, start + len(rows), device=self.codebooks.device)
        codes, weights = [], weights.to(rows.device)
        for subspace, part in enumerate(self._split(rows)):
            means = ClusterMeans(self.codebooks[subspace].to(rows.device))
            codes.append(self._nearest(part, ids, self.codebooks[subspace].to(rows.device)))
            means.add(part, codes[-1], weights)
            self.gathered["sums"][subspace] += means.sums.to(self.codebooks.device)
            self.gathered["totals"][subspace] += means.totals.to(self.codebooks.device)
        return torch.stack(codes, dim=1)

    def set_codes(self, codes: Tensor, *, start: int = 0) -> None:
        """Stores (N, M) integer codes in [0, K) of the rows from `start`, a multiple of 8, on; N too, unless they are the last rows."""
        pack_rows_(self.packed_codes, codes.to(self.packed_codes.device), start, self.num_bits)

    def _random_codes(self, generator: torch.Generator) -> Tensor:
        """Packed codes of a table that is not fitted."""
        codes = torch.randint(self.num_centroids, (self.num_embeddings, self.method.num_subspaces), dtype=torch.int32, generator=generator)
        return pack(codes, self.num_bits)

    def _codes(self, ids: Tensor) -> Tensor:
        """The centroid of each part of some rows: (N,) int64 -> (N, M) int64."""
        return unpack_rows(self.packed_codes, ids, len(self.codebooks), self.num_bits)

    def _words(self, codes: Tensor) -> Tensor:
        """Centroids side by side: (N, M) int64 -> (N, D)."""
        num_subspaces, num_centroids, width = self.codebooks.shape
        first_rows = torch.arange(0, num_subspaces * num_centroids, num_centroids, device=codes.device)
        return F.embedding(codes + first_rows, self.codebooks.view(-1, width)).flatten(1)  # (N, M, D / M) -> (N, D)

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Parts of rows: (N, D) -> M of (N, D / M)."""
        return list(rows.chunk(self.method.num_subspaces, dim=1))

    def _cluster(self, part: Tensor, ids: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Centroids for a part (N, D / M) of rows (N,) that weigh (N,): (K, D / M)."""
        return kmeans(part, self.num_centroids, weights=weights, generator=generator)

    def _nearest(self, part: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
        """The nearest of the centroids that rows may take: parts (N, D / M) of rows (N,), (K, D / M) -> (N,) int64."""
        return nearest(part, centroids)


def used_centroids(method: Method, num_centroids: int, num_embeddings: int) -> int:
    """Centroids that a table can use: no more than it has rows.

    Raises:
        ValueError: `num_centroids` is not between 2 and 65536.
    """
    if not 2 <= num_centroids <= 2**MAX_BITS:
        raise ValueError(f"{type(method).__name__} has num_centroids={num_centroids}. Choose 2 to {2**MAX_BITS}; a power of two wastes no bits.")
    return min(num_centroids, num_embeddings)


def code_bits(num_centroids: int) -> int:
    """Bits of one stored code: ceil(log2 K), at least 1."""
    return max(1, (num_centroids - 1).bit_length())


def centroid_choices(num_embeddings: int) -> list[int]:
    """Powers of two that a budget tries, 4 to 4096, none more than the first that has a centroid for every row."""
    return [2**bits for bits in range(2, 13) if bits == 2 or 2 ** (bits - 1) < num_embeddings]


def coding_error(spread: Spread, *, num_subspaces: int, num_levels: int, num_centroids: int) -> float:
    """Share of the variance that codes lose: what Gaussian rows of this spread would, and popular rows nothing, who have a centroid each.

    Rows of trained tables are no Gaussian ones; the contract suite holds the estimate within a factor of three of the error of a fit.
    """
    lost = parts_error(spread, spread.spectra(num_subspaces), num_bits=num_levels * math.log2(min(num_centroids, spread.num_embeddings)))
    return min(1.0, spread.share_beyond(num_centroids) ** num_levels * lost)


def parts_error(spread: Spread, spectra: Sequence[Sequence[float]], *, num_bits: float) -> float:
    """Share of the variance that is lost where each part of a row, its variances given along principal axes, has a code of `num_bits`."""
    if spread.variance == 0:
        return 0.0
    return sum(coded_variance(spectrum, num_bits) for spectrum in spectra) / spread.variance
