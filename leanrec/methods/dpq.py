"""Differentiable product quantization. Chen, Li and Sun, ICML 2020, arXiv 1908.09756."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.methods.pq import PQ, PQTable
from leanrec.ops import fused
from leanrec.ops.kmeans import squared_distances

REVIVE_STEPS = 50  # a code that no row took for so many steps starts again at a row


@dataclass(frozen=True)
class DPQ(PQ):
    """Product quantization whose codes are learned together with the model.

    While it trains from scratch it holds a free row, the query, for every id; each part of a query takes the centroid with the nearest key.
    Then the queries go and the codes stay: what is stored and how it is looked up is that of PQ. Given trained rows and no task, the
    objective is that of k-means, so `fit` is PQ's.

    Beyond the paper, codes that fall out of use start again at rows, for which the paper normalises distances over the batch. The queries
    start at the rows of the table, and `sx` takes the nearest key instead of the largest product: a key between others could never win that.

    Attributes:
        variant: How gradients pass the choice of a centroid. `vq`: straight through to the query, keys are the centroids and follow their
            queries; `sx`: by a softmax over keys of their own, and to the centroids directly.
        commitment: Of `vq`: pull of a query to its centroid, in units of the centroid's to the query. The paper has 0.
        temperature: Of the softmax of squared distances of `sx`, in units of their mean.
    """

    gaps: ClassVar[Mapping[str, str]] = {}
    variant: str = "vq"
    commitment: float = 0.02
    temperature: float = 0.1

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        name = type(self).__name__
        if self.variant not in ("vq", "sx"):
            raise ValueError(f"{name} has variant={self.variant!r}. Choose 'vq' or 'sx'.")
        if self.commitment < 0 or self.temperature <= 0:
            raise ValueError(f"{name} has commitment={self.commitment} and temperature={self.temperature}. Choose at least 0, and more than 0.")
        return super().nbytes(num_embeddings, embedding_dim)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> DPQTable:
        self.nbytes(num_embeddings, embedding_dim)
        return DPQTable(self, num_embeddings, embedding_dim, generator=generator)


class DPQTable(PQTable):
    """What `PQTable` stores.

    Between `begin` and `finish` also `queries`: (V, D) float32, `used`: (M, K) bool, and for `sx` `keys`: (M, K, D / M) float32.
    """

    method: DPQ
    queries: nn.Parameter | None
    keys: nn.Parameter | None
    used: Tensor | None

    def __init__(self, method: DPQ, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.register_parameter("queries", None)
        self.register_parameter("keys", None)
        self.register_buffer("used", None)
        self._distance: Tensor | float = 0.0
        self._last_ids = torch.empty(0, dtype=torch.int64)

    def begin(self) -> None:
        self.queries = nn.Parameter(self.decode())
        self.used = torch.zeros_like(self.codebooks[..., 0], dtype=torch.bool)
        if self.method.variant == "sx":
            self.keys = nn.Parameter(self.codebooks.detach().clone())

    def finish(self) -> None:
        if self.queries is None:
            return
        for ids in torch.arange(self.num_embeddings, device=self.queries.device).split(65_536):
            self.set_codes(self._codes(ids), start=int(ids[0]))
        self.queries = self.keys = self.used = None

    def lookup(self, ids: Tensor) -> Tensor:
        if self.queries is None or not self.training:
            return super().lookup(ids)
        assert self.used is not None
        self._last_ids = ids
        queries = F.embedding(ids, self.queries, sparse=self.sparse)
        codes = self._choose(queries.detach(), ids)
        self.used[torch.arange(len(self.used), device=ids.device), codes] = True
        return self._learn_vq(queries, codes, ids) if self.keys is None else self._learn_sx(queries, self.keys, codes, ids)

    def coded(self) -> fused.Coded | None:
        return super().coded() if self.queries is None else None

    def penalty(self) -> Tensor | float:
        """For `vq`, the mean squared distance between the rows looked up since the last call and their centroids."""
        distance, self._distance = self._distance, 0.0
        return distance

    @torch.no_grad()
    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        self._distance = 0.0  # of a step whose loss left the penalty out
        if self.queries is not None and self.used is not None and (step + 1) % REVIVE_STEPS == 0:
            ids = self._last_ids.unique()
            for takeable, takers in self._takers(ids):
                self._revive(takeable, self.queries[ids[takers]], ids[takers])
            self.used.zero_()
        return ()

    def _codes(self, ids: Tensor) -> Tensor:
        return super()._codes(ids) if self.queries is None else self._choose(self.queries.detach()[ids], ids)

    def _choose(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Codes of queries: (N, D), (N,) -> (N, M)."""
        keys = (self.codebooks if self.keys is None else self.keys).detach()
        return torch.stack([self._nearest(part, ids, keys[subspace]) for subspace, part in enumerate(self._split(queries))], dim=1)

    def _learn_vq(self, queries: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
        """Centroids, whose gradient goes to the queries: (N, D), (N, M), (N,) -> (N, D)."""
        words = self._words(codes)
        distances = squared_distances(words, queries.detach()) + self.method.commitment * squared_distances(words.detach(), queries)
        if self.padding_idx is not None:
            distances = distances.masked_fill(ids == self.padding_idx, 0.0)
        self._distance = self._distance + distances.sum() / max(len(ids), 1)
        return queries + (words - queries).detach()

    def _learn_sx(self, queries: Tensor, keys: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
        """Centroids, whose gradient goes to them and, as if each row were their mean under the softmax, to queries and keys."""
        parts = torch.stack(self._split(queries))  # (M, N, D / M)
        distances = parts.square().sum(2, keepdim=True) - 2 * parts @ keys.mT + keys.square().sum(2).unsqueeze(1)  # (M, N, K)
        scale = self.method.temperature * distances.detach().mean((1, 2), keepdim=True).clamp(min=1e-12)
        soft = self._softmax(-distances / scale, ids) @ self.codebooks.detach()
        return self._words(codes) + (soft - soft.detach()).transpose(0, 1).flatten(1)

    def _softmax(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Shares of the centroids that rows may take: (M, N, K), (N,) -> (M, N, K)."""
        return logits.softmax(2)

    def _takers(self, ids: Tensor) -> list[tuple[slice, Tensor]]:
        """Stretches that make up the centroids, each with which of some rows may take it: (N,) -> slices and (N,) bool."""
        return [(slice(0, self.num_centroids), torch.ones_like(ids, dtype=torch.bool))]

    def _revive(self, takeable: slice, queries: Tensor, ids: Tensor) -> None:
        """Move codes that no row took since the last call to those of some rows that their centroids fit worst.

        Args:
            takeable: The codes to look at.
            queries: (N, D) of the rows.
            ids: (N,) of the rows.
        """
        assert self.used is not None
        codebooks = [words for words in (self.keys, self.codebooks) if words is not None]
        codes = self._choose(queries, ids)
        for subspace, part in enumerate(self._split(queries)):
            distances = squared_distances(part, codebooks[0][subspace, codes[:, subspace]])
            dead = (~self.used[subspace, takeable]).nonzero().squeeze(1) + takeable.start
            worst = distances.topk(min(len(dead), len(ids))).indices
            for words in codebooks:
                words[subspace, dead[: len(worst)]] = part[worst]
