"""CCE, clustered compositional embeddings. Tsang and Ahle, Clustering the Sketch, NeurIPS 2023, arXiv 2210.05974."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.methods.pq import MAX_BITS, centroid_choices, code_bits, coding_error
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest, sample_rows
from leanrec.ops.packing import pack, pack_rows_, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread

_CHUNK_ROWS = 65_536  # a multiple of 8, as packed pointers are written


@dataclass(frozen=True)
class CCE(Method):
    """A row is cut into equal parts; each is the sum of a clustered row, which a stored pointer names, and of a hashed row.

    Trained from scratch, pointers are random at first. Every `cluster_steps` steps all rows are clustered anew by what they have learned:
    centroids become the clustered rows, the hash is drawn afresh, and hashed rows become the means of what the centroids leave. k-means
    sees a sample of the rows, and then every row goes to its nearest centroid. The public code keeps both pointers of each id as
    64-bit numbers and does not count them; here a pointer has ceil(log2 num_rows) bits and the hash is computed.

    Post-training, `fit` does the same once with the rows of a trained table, weighted by their counts.

    Attributes:
        num_chunks: M, parts per row; divides embedding_dim.
        num_rows: K, rows of the clustered table and of the hashed table of each part; a table of fewer rows uses one for each.
        cluster_steps: Training steps between clusterings.
        num_clusterings: Clusterings in all; the last part of training should be left without one.
        weight_power: A row counts as count ** weight_power in the k-means of a fit; in training from scratch all rows count alike.
    """

    knob: ClassVar[str] = "num_chunks"
    num_chunks: int = 4
    num_rows: int = 64
    cluster_steps: int = 500
    num_clusterings: int = 4
    weight_power: float = 0.5

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [parts for parts in range(1, embedding_dim + 1) if embedding_dim % parts == 0]

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        sizes = centroid_choices(num_embeddings)
        return [replace(self, num_chunks=parts, num_rows=size) for parts in self.knob_values(num_embeddings, embedding_dim) for size in sizes]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if not 2 <= self.num_rows <= 2**MAX_BITS:
            raise ValueError(f"CCE has num_rows={self.num_rows}. Choose 2 to {2**MAX_BITS}; a power of two wastes no bits.")
        choices = self.knob_values(num_embeddings, embedding_dim)
        if self.num_chunks not in choices:
            raise ValueError(
                f"CCE splits a row into num_chunks={self.num_chunks} equal parts, but embedding_dim={embedding_dim} is not divisible by "
                f"{self.num_chunks}. Choose one of {choices}."
            )
        if self.cluster_steps < 1 or self.num_clusterings < 0:
            raise ValueError(
                f"CCE has cluster_steps={self.cluster_steps} and num_clusterings={self.num_clusterings}. Choose at least 1 step and 0 clusterings."
            )
        num_rows = min(self.num_rows, num_embeddings)
        return packed_nbytes(num_embeddings, self.num_chunks, code_bits(num_rows)) + 2 * num_rows * embedding_dim * 4 + self.num_chunks * 8

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> CCETable:
        self.nbytes(num_embeddings, embedding_dim)
        return CCETable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        coded = coding_error(spread, num_subspaces=self.num_chunks, num_levels=1, num_centroids=self.num_rows)
        # Of what the centroids leave, an id keeps its part in the mean of its hashed row: see Hash.
        own, others = spread.shares, (1 - spread.shares) / min(self.num_rows, spread.num_embeddings)
        return coded * float((own * others / (own + others)).sum())


class CCETable(Table):
    """`clustered` and `hashed`: (M K, D / M) float32, trainable, the rows of one part after those of another.

    `packed_pointers`: (ceil(V * M * bits / 8),) uint8 and `seeds`: (M,) int64, frozen but for clusterings.
    """

    method: CCE
    packed_pointers: Tensor
    seeds: Tensor

    def __init__(self, method: CCE, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.num_rows = min(method.num_rows, num_embeddings)
        self.num_bits = code_bits(self.num_rows)
        draws = torch.Generator().manual_seed(self.seed)
        shape = method.num_chunks * self.num_rows, embedding_dim // method.num_chunks
        self.clustered = nn.Parameter(torch.randn(shape, generator=draws) * 0.01 / 2**0.5)
        self.hashed = nn.Parameter(torch.randn(shape, generator=draws) * 0.01 / 2**0.5)
        pointers = torch.randint(self.num_rows, (num_embeddings, method.num_chunks), dtype=torch.int32, generator=draws)
        self.register_buffer("packed_pointers", pack(pointers, self.num_bits))
        self.register_buffer("seeds", torch.randint(2**62, (method.num_chunks,), generator=draws))
        self._begun = False

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.check_weight(weight)
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        generator = torch.Generator().manual_seed(self.seed)
        rows, sample_weights = sample_rows(weights, self.num_rows, generator=generator)
        self._cluster(weight[rows.to(weight.device)].float(), sample_weights, generator)
        self._point(self.row_chunks(weight), row_weights(counts, self.num_embeddings, power=1.0))
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        pointers = unpack_rows(self.packed_pointers, ids, self.method.num_chunks, self.num_bits)
        parts = F.embedding(pointers + self._starts(), self.clustered) + F.embedding(self._hashes(ids) + self._starts(), self.hashed)
        return parts.flatten(1)  # (N, M, D / M) -> (N, D)

    def begin(self) -> None:
        self._begun = True

    @torch.no_grad()
    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        number, left = divmod(step + 1, self.method.cluster_steps)
        if not self._begun or left or number > self.method.num_clusterings:
            return ()
        before, weights = deepcopy(self), torch.ones(self.num_embeddings)
        generator = torch.Generator().manual_seed(self.seed + number)
        rows, sample_weights = sample_rows(weights, self.num_rows, generator=generator)
        self._cluster(before.lookup(rows.to(self.seeds.device)).float(), sample_weights, generator)
        self.seeds.copy_(torch.randint(2**62, self.seeds.shape, generator=generator))
        self._point(before._learned_chunks(), weights)
        everything = torch.arange(len(self.clustered), device=self.seeds.device)
        return [(self.clustered, everything), (self.hashed, everything)]

    def finish(self) -> None:
        self._begun = False

    def pointers(self) -> Tensor:
        """The clustered row of each part of each row: (V, M) int64."""
        ids = torch.arange(self.num_embeddings, device=self.seeds.device)
        return unpack_rows(self.packed_pointers, ids, self.method.num_chunks, self.num_bits)

    def _starts(self) -> Tensor:
        """First row of each part in the tables: (M,)."""
        return torch.arange(0, len(self.clustered), self.num_rows, device=self.seeds.device)

    def _hashes(self, ids: Tensor) -> Tensor:
        return hash_buckets(ids, self.seeds, self.num_rows)

    def _learned_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and rows, as `row_chunks` gives them of a weight."""
        for ids in torch.arange(self.num_embeddings, device=self.seeds.device).split(_CHUNK_ROWS):
            yield int(ids[0]), self.lookup(ids).float()

    def _cluster(self, sample: Tensor, weights: Tensor, generator: torch.Generator) -> None:
        """Clustered rows become the centroids of a sample (S, D) of the rows, part by part."""
        parts = sample.chunk(self.method.num_chunks, dim=1)
        self.clustered.copy_(torch.cat([kmeans(part, self.num_rows, weights=weights, generator=generator) for part in parts]))

    def _point(self, chunks: Iterable[tuple[int, Tensor]], weights: Tensor) -> None:
        """Points every row at its nearest clustered rows; hashed rows become the weighted means of what these leave, 0 where no row hashes to."""
        means: list[ClusterMeans] = []
        for start, rows in chunks:
            centroids = self.clustered.to(rows).chunk(self.method.num_chunks)
            means = means or [ClusterMeans(torch.zeros_like(part)) for part in centroids]
            hashes = self._hashes(torch.arange(start, start + len(rows), device=self.seeds.device)).to(rows.device)
            chunk_weights = weights[start : start + len(rows)].to(rows.device)
            pointers = []
            for number, part in enumerate(rows.chunk(self.method.num_chunks, dim=1)):
                pointers.append(nearest(part, centroids[number]))
                means[number].add(part - centroids[number][pointers[number]], hashes[:, number], chunk_weights)
            pack_rows_(self.packed_pointers, torch.stack(pointers, dim=1).to(self.seeds.device), start, self.num_bits)
        self.hashed.copy_(torch.cat([mean.value() for mean in means]))
