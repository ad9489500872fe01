"""Memory shared in proportion to likeness (SCMA, LMA). Desai, Pan, Sun, Chou and Shrivastava, 2021, arXiv 2103.06124."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights, size_grid
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import ClusterMeans
from leanrec.ops.minhash import MinHashes
from leanrec.ops.packing import pack_rows_, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread, coded_variance, moments

MAX_BITS = 16
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class LMA(Method):
    """Every number of every row is read from one small memory, at a place hashed from a signature of the id and the number's column.

    Ids with one signature share the numbers of its columns, so signatures that agree for like ids make like ids share. From scratch they
    are min-hashes of what ids stand beside in the log: two ids share the part of their rows that is the (weighted) Jaccard similarity of
    their contexts. An id that was never seen there has random ones, which is the hashing trick number by number. Post-training they
    are the signs of random projections of the trained rows (Charikar, STOC 2002).

    The paper compares the sets of samples in which ids occur, for one memory under the ids of all fields; here each table has its own, and
    ids of one field never meet in a sample, but they do meet the same ids of other fields. The public code stores the V x D places, twice
    the size of the table that they replace; here they are computed from a few bits per id. Rows also have a mean, which the paper's have not.

    Attributes:
        memory_size: Numbers in the memory.
        num_signatures: Signatures of an id; column j takes number j modulo num_signatures. No more than there are columns are used.
        signature_bits: Bits of a stored signature, 1 to 16.
        weight_power: A row counts as count ** weight_power in the mean of a place.
    """

    knob: ClassVar[str] = "memory_size"
    memory_size: int = 4096
    num_signatures: int = 4
    signature_bits: int = 16
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return self._memory_sizes(num_embeddings, embedding_dim, per_octave=1)

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        layouts = [replace(self, signature_bits=bits) for bits in (1, 2, 4, 8, 16)]
        return [layout.with_knob(size) for layout in layouts for size in layout._memory_sizes(num_embeddings, embedding_dim, per_octave=2)]

    def _memory_sizes(self, num_embeddings: int, embedding_dim: int, *, per_octave: int) -> list[int]:
        """From a number per column on; no column has more different places than its signature has values, or the table rows."""
        return size_grid(embedding_dim, min(num_embeddings, 2**self.signature_bits) * embedding_dim, per_octave=per_octave)

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if min(self.memory_size, self.num_signatures) < 1 or not 1 <= self.signature_bits <= MAX_BITS:
            raise ValueError(
                f"LMA has memory_size={self.memory_size}, num_signatures={self.num_signatures} and signature_bits={self.signature_bits}. "
                f"Choose at least 1 number and 1 signature, and 1 to {MAX_BITS} bits."
            )
        return packed_nbytes(num_embeddings, self.used_signatures(embedding_dim), self.signature_bits) + (self.memory_size + embedding_dim) * 4 + 8

    def used_signatures(self, embedding_dim: int) -> int:
        """Signatures that some column takes."""
        return min(self.num_signatures, embedding_dim)

    def sign_bits(self, embedding_dim: int) -> int:
        """Bits of a signature that a fit makes use of: more than there are places for would only send like rows apart.

        Rows do not use all values alike; with about twice as many values as places per column, errors on trained tables are smallest.
        """
        return min(self.signature_bits, (self.memory_size // embedding_dim).bit_length())

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> LMATable:
        self.nbytes(num_embeddings, embedding_dim)
        return LMATable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        if spread.variance == 0:
            return 0.0
        num_bits = self.sign_bits(spread.embedding_dim)
        [spectrum] = spread.spectra(1)
        unlike = coded_variance(spectrum, num_bits) / spread.variance  # of rows of one signature; signs come near to the best code
        own = spread.shares
        near, far = (1 - own) / 2**num_bits, (1 - own) * spread.embedding_dim / self.memory_size  # others at a place, by signature and by chance
        return float((own * (near * unlike + far) / (own + near + far)).sum())


class LMATable(Table):
    """`memory`: (memory_size,) and `mean`: (D,), float32, trainable.

    Frozen: `packed_signatures`: (ceil(V * num_signatures * bits / 8),) uint8, `address_seed`: (1,) int64.
    """

    method: LMA
    packed_signatures: Tensor
    address_seed: Tensor

    def __init__(self, method: LMA, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.num_signatures = method.used_signatures(embedding_dim)
        self._met: MinHashes | None = None
        draws = torch.Generator().manual_seed(self.seed)
        self.memory = nn.Parameter(torch.randn(method.memory_size, generator=draws) * 0.01)
        self.mean = nn.Parameter(torch.zeros(embedding_dim))
        self.register_buffer("address_seed", torch.randint(2**62, (1,), generator=draws))
        nbytes = packed_nbytes(num_embeddings, self.num_signatures, method.signature_bits)
        self.register_buffer("packed_signatures", torch.randint(256, (nbytes,), generator=draws, dtype=torch.uint8))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power).to(weight.device)
        mean = moments((rows for _, rows in self.row_chunks(weight)), weights)[0].float()
        directions = self._directions().to(weight.device)
        places = ClusterMeans(torch.zeros(len(self.memory), 1, device=weight.device))
        for start, rows in self.row_chunks(weight):
            rows = rows - mean
            signs = (rows @ directions > 0).long()  # (num_signatures, N, bits)
            signatures = (signs << torch.arange(signs.shape[-1], device=signs.device)).sum(-1).T
            self._store(signatures, start)
            addresses = self._addresses(signatures.to(self.address_seed.device)).flatten().to(rows.device)
            places.add(rows.reshape(-1, 1), addresses, weights[start : start + len(rows)].repeat_interleave(self.embedding_dim))
        self.memory.copy_(places.value().squeeze(1))
        self.mean.copy_(mean)
        return self

    def observe(self, ids: Tensor, context: Tensor) -> None:
        if self._met is None:
            seeds = torch.randint(2**62, (self.num_signatures,), generator=torch.Generator().manual_seed(self.seed))
            self._met = MinHashes(self.num_embeddings, seeds)
        self._met.add(ids, context)

    def begin(self) -> None:
        """The signatures become those of what the ids stood beside, and the running minima are let go; ids that were not seen keep theirs."""
        if self._met is None:
            return
        minima, self._met = self._met.value(), None
        for start in range(0, self.num_embeddings, _CHUNK_ROWS):
            least = minima[start : start + _CHUNK_ROWS].contiguous()
            hashed = hash_buckets(least.view(torch.int32).long(), torch.zeros(1, dtype=torch.int64), 2**self.method.signature_bits).squeeze(-1)
            drawn = self._signatures(torch.arange(start, start + len(least), device=self.packed_signatures.device))
            self._store(torch.where(least.isfinite(), hashed, drawn.cpu()), start)

    def lookup(self, ids: Tensor) -> Tensor:
        addresses = self.addresses(ids)
        return self.memory.index_select(0, addresses.flatten()).view(addresses.shape) + self.mean

    def addresses(self, ids: Tensor) -> Tensor:
        """Place in the memory of each number of some rows: (N,) int64 -> (N, D) int64 in [0, memory_size)."""
        return self._addresses(self._signatures(ids))

    def _signatures(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, num_signatures)."""
        return unpack_rows(self.packed_signatures, ids, self.num_signatures, self.method.signature_bits)

    def _addresses(self, signatures: Tensor) -> Tensor:
        """(N, num_signatures) -> (N, D)."""
        columns = torch.arange(self.embedding_dim, device=signatures.device)
        keys = signatures[:, columns % self.num_signatures] * self.embedding_dim + columns
        return hash_buckets(keys, self.address_seed, self.method.memory_size).squeeze(-1)

    def _store(self, signatures: Tensor, start: int) -> None:
        """Keep (N, num_signatures) signatures of the rows from `start` on."""
        pack_rows_(self.packed_signatures, signatures.to(self.packed_signatures.device), start, self.method.signature_bits)

    def _directions(self) -> Tensor:
        """Normals of the planes whose sides are the bits of the signatures: (num_signatures, D, bits)."""
        draws = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.num_signatures, self.embedding_dim, self.method.sign_bits(self.embedding_dim), generator=draws)
