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
_LARGEST = 127  # whole number of a word
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
        word_bits: Bits of a value of a centroid, 32 (float32) or 8: whole numbers, which are summed as such, in steps of a scale for each
            column. Code books are then a quarter as large and faster to read, and only the scales can be trained.
    """

    gaps: ClassVar[Mapping[str, str]] = PQ.gaps
    knob: ClassVar[str] = "num_levels"
    num_levels: int = 4
    num_centroids: int = 256
    weight_power: float = 0.5
    word_bits: int = 32

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
        if self.word_bits not in (8, 32):
            raise ValueError(f"RQ has word_bits={self.word_bits}. Choose 8 or 32.")
        num_centroids = used_centroids(self, self.num_centroids, num_embeddings)
        codes = packed_nbytes(num_embeddings, self.num_levels, code_bits(num_centroids))
        scales = embedding_dim * 4 if self.word_bits == 8 else 0
        return codes + self.num_levels * num_centroids * embedding_dim * self.word_bits // 8 + scales

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> RQTable:
        self.nbytes(num_embeddings, embedding_dim)
        kind = RQTable if self.word_bits == 32 else ByteRQTable
        return kind(self, num_embeddings, embedding_dim, generator=generator)

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
        self.num_centroids = used_centroids(method, method.num_centroids, num_embeddings)
        self.num_bits = code_bits(self.num_centroids)
        draws = torch.Generator().manual_seed(self.seed)
        self.hold(torch.randn(method.num_levels, self.num_centroids, embedding_dim, generator=draws) * 0.01 / method.num_levels**0.5)
        codes = torch.randint(self.num_centroids, (num_embeddings, method.num_levels), dtype=torch.int32, generator=draws)
        self.register_buffer("packed_codes", pack(codes, self.num_bits))

    def hold(self, codebooks: Tensor) -> None:
        """Make the tensors for code books like these: (L, K, D) float32."""
        self.codebooks = nn.Parameter(codebooks)

    def books(self) -> Tensor:
        """The code books as they are stored: (L, K, D)."""
        return self.codebooks.detach()

    def set_books(self, codebooks: Tensor) -> None:
        """Store (L, K, D) code books."""
        self.codebooks.copy_(codebooks)

    @property
    def sampling(self) -> Sampling:
        return Sampling(num_sample_rows(self.num_centroids))

    def fit_sample(self, sample: Sample) -> None:
        num_levels, num_centroids = self.method.num_levels, self.num_centroids
        rows, weights = sample.rows, sample.weights.to(sample.rows.device)
        generator = torch.Generator().manual_seed(self.seed)
        codebooks, codes = residual_codebooks(rows, num_levels, num_centroids, weights=weights, generator=generator)
        for _ in range(_SAMPLE_ROUNDS):
            codes = improve_codes(rows, codes, codebooks, beam_size=_beam_size(_FIRST_SEARCH, num_centroids))
            codebooks = update_codebooks(rows, codes, codebooks, weights=weights)
        self.set_books(codebooks)
        self.gathered = NormalSums.empty(self.books()).tensors() if num_levels * num_centroids <= _MAX_WORDS else {}

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        codes = beam_search(rows, self.books().to(rows.device), beam_size=_beam_size(_LAST_SEARCH, self.num_centroids))
        if self.gathered:
            NormalSums(**self.gathered).add(rows, codes, weights.to(rows.device))
        return {"packed_codes": pack(codes, self.num_bits)}

    def settle(self) -> None:
        if self.gathered:
            self.set_books(NormalSums(**self.gathered).update(self.books()))

    def lookup(self, ids: Tensor) -> Tensor:
        return sum_words(self._codes(ids), self.codebooks)

    def coded(self) -> fused.Coded | None:
        return fused.sums(self.held("packed_codes"), self.held("codebooks"), self.num_bits, self.embedding_dim)

    def codes(self) -> Tensor:
        """The centroid of each level of each row: (V, L) int64."""
        return self._codes(torch.arange(self.num_embeddings, device=self.packed_codes.device))

    def _codes(self, ids: Tensor) -> Tensor:
        return unpack_rows(self.packed_codes, ids, self.method.num_levels, self.num_bits)


class ByteRQTable(RQTable):
    """`packed_codes` as in `RQTable`. `words`: (L, K, D) int8, frozen. `scales`: (D,) float32, what 1 stands for in a column, trainable."""

    words: Tensor

    def hold(self, codebooks: Tensor) -> None:
        self.register_buffer("words", torch.empty_like(codebooks, dtype=torch.int8))
        self.scales = nn.Parameter(torch.empty(self.embedding_dim))
        with torch.no_grad():
            self.set_books(codebooks)

    def books(self) -> Tensor:
        return self.words * self.scales.detach()

    def set_books(self, codebooks: Tensor) -> None:
        # One scale for all levels: the words of later ones are smaller, but what an 8-bit step leaves is far less than what codes leave.
        scales = codebooks.abs().amax((0, 1)).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        self.scales.copy_(scales)
        self.words.copy_((codebooks / scales).round())

    def lookup(self, ids: Tensor) -> Tensor:
        return sum_words(self._codes(ids), self.words).to(self.scales.dtype) * self.scales

    def coded(self) -> fused.Coded | None:
        return fused.byte_sums(self.held("packed_codes"), self.held("words"), self.held("scales"), self.num_bits)


def _beam_size(search: int, num_centroids: int) -> int:
    return max(1, min(_MAX_BEAM, search // num_centroids))
