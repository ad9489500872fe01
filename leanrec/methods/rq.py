"""Residual quantization, improved as an additive one. Chen, Guan and Wang, Sensors 2010, doi:10.3390/s101211259; Babenko and Lempitsky, CVPR 2014."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanrec.methods.base import Method
from leanrec.methods.pq import PQ, centroid_choices, code_bits, coding_error, used_centroids
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops import fused
from leanrec.ops.additive import NormalSums, beam_search, improve_codes, residual_codebooks, sum_words, update_codebooks
from leanrec.ops.kmeans import num_sample_rows
from leanrec.ops.packing import pack, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread

_SAMPLE_ROUNDS = 7
# Words compared per row and level, which set the width of the beam: a wider one finds better codes and takes longer in proportion.
_FIRST_SEARCH, _LAST_SEARCH = 1024, 2048
_MAX_BEAM = 16
_MAX_WORDS = 4096  # of all levels together, up to which the words are fitted to all rows and not to the sample only: it takes their square in memory


@dataclass(frozen=True)
class RQ(Method):
    """A row is the sum of one centroid per level, each as wide as the row.

    Levels are fitted one after the other to what is left of a sample of the rows, then code books and codes in turn, all levels together;
    a step that does not lower the count-weighted error is not taken. Then every row is given its codes, and the code words are fitted to
    all rows. Better than PQ at the same code length, for code books num_levels times as large.

    Attributes:
        num_levels: L, centroids summed per row, 1 to 32.
        num_centroids: K of each level, 2 to 65536; a table of fewer rows has one centroid per row.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    gaps: ClassVar[Mapping[str, str]] = PQ.gaps
    knob: ClassVar[str] = "num_levels"
    num_levels: int = 4
    num_centroids: int = 256
    weight_power: float = 0.5

    @property
    def streaming_gap(self) -> str | None:
        return None

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return [1, 2, 3, 4, 6, 8, 12, 16]

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        sizes = centroid_choices(num_embeddings)
        return [replace(self, num_levels=levels, num_centroids=size) for levels in self.knob_values(num_embeddings, embedding_dim) for size in sizes]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if not 1 <= self.num_levels <= 32:
            raise ValueError(f"RQ has num_levels={self.num_levels}. Choose 1 to 32.")
        num_centroids = used_centroids(self, self.num_centroids, num_embeddings)
        codes = packed_nbytes(num_embeddings, self.num_levels, code_bits(num_centroids))
        return codes + self.num_levels * num_centroids * embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> RQTable:
        self.nbytes(num_embeddings, embedding_dim)
        return RQTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        return coding_error(spread, num_subspaces=1, num_levels=self.num_levels, num_centroids=self.num_centroids)


class RQTable(StreamingTable):
    """`packed_codes`: (ceil(V * L * bits / 8),) uint8, frozen. `codebooks`: (L, K, D) float32, trainable.

    Built without a fit, codes and code books are random.
    """

    row_parts = ("packed_codes",)
    method: RQ
    packed_codes: Tensor

    def __init__(self, method: RQ, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        num_levels, num_centroids = method.num_levels, used_centroids(method, method.num_centroids, num_embeddings)
        self.num_bits = code_bits(num_centroids)
        draws = torch.Generator().manual_seed(self.seed)
        self.codebooks = nn.Parameter(torch.randn(num_levels, num_centroids, embedding_dim, generator=draws) * 0.01 / num_levels**0.5)
        codes = torch.randint(num_centroids, (num_embeddings, num_levels), dtype=torch.int32, generator=draws)
        self.register_buffer("packed_codes", pack(codes, self.num_bits))

    @property
    def sampling(self) -> Sampling:
        return Sampling(num_sample_rows(self.codebooks.shape[1]))

    def fit_sample(self, sample: Sample) -> None:
        num_levels, num_centroids, _ = self.codebooks.shape
        rows, weights = sample.rows, sample.weights.to(sample.rows.device)
        generator = torch.Generator().manual_seed(self.seed)
        codebooks, codes = residual_codebooks(rows, num_levels, num_centroids, weights=weights, generator=generator)
        for _ in range(_SAMPLE_ROUNDS):
            codes = improve_codes(rows, codes, codebooks, beam_size=_beam_size(_FIRST_SEARCH, num_centroids))
            codebooks = update_codebooks(rows, codes, codebooks, weights=weights)
        self.codebooks.copy_(codebooks)
        self.gathered = NormalSums.empty(self.codebooks).tensors() if num_levels * num_centroids <= _MAX_WORDS else {}

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        codebooks = self.codebooks.to(rows.device)
        codes = beam_search(rows, codebooks, beam_size=_beam_size(_LAST_SEARCH, codebooks.shape[1]))
        if self.gathered:
            NormalSums(**self.gathered).add(rows, codes, weights.to(rows.device))
        return {"packed_codes": pack(codes, self.num_bits)}

    def settle(self) -> None:
        if self.gathered:
            self.codebooks.copy_(NormalSums(**self.gathered).update(self.codebooks))

    def lookup(self, ids: Tensor) -> Tensor:
        return sum_words(self._codes(ids), self.codebooks)

    def coded(self) -> fused.Coded | None:
        parameters, buffers = self.held()
        return fused.sums(buffers["packed_codes"], parameters["codebooks"], self.num_bits, self.embedding_dim)

    def codes(self) -> Tensor:
        """The centroid of each level of each row: (V, L) int64."""
        return self._codes(torch.arange(self.num_embeddings, device=self.packed_codes.device))

    def _codes(self, ids: Tensor) -> Tensor:
        return unpack_rows(self.packed_codes, ids, len(self.codebooks), self.num_bits)


def _beam_size(search: int, num_centroids: int) -> int:
    return max(1, min(_MAX_BEAM, search // num_centroids))
