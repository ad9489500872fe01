"""Deep hash embedding: a network computes each row from hashes of its id. Kang et al., KDD 2021, arXiv 2010.10784."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.kmeans import sample_rows
from leanrec.ops.spread import Spread

_HASH_VALUES = 1_000_000  # the paper's m
_MISH_SQUARE = 0.4523  # mean square of Mish of a standard normal value, by numerical integration
_RIDGE = 1e-4  # of the mean variance of a feature: keeps the last layer's weights small, which rounded copies of it need
_LEARNING_RATE, _MOST_LEARNING_RATE = 0.5, 0.02  # the first is divided by the width


@dataclass(frozen=True)
class DeepHash(Method):
    """No table at all: hashes of the id, as numbers from -1 to 1, go through hidden layers with Mish and a linear one, whose output is the row.

    The paper normalizes over batches between the layers; here nothing does, so that a row does not depend on its batch. It only trains from
    scratch. A fit sets the last layer by least squares on random hidden layers, improves those by gradient steps, and sets it again: random
    layers keep as much as there are rows of their width, and the steps add to that, the more of them the better. On a table of many more
    rows than a layer is wide, a fit keeps the popular rows and little else.

    Attributes:
        width: Of each hidden layer.
        num_layers: Hidden layers, 1 or more. The paper has 5 of about 1800.
        num_hashes: Hashes of an id, 1 or more. The paper has 1024.
        weight_power: A row counts as count ** weight_power in the fit.
        num_steps: Gradient steps of a fit.
        batch_size: Rows in a step, drawn by their weight.
    """

    knob: ClassVar[str] = "width"
    width: int = 64
    num_layers: int = 2
    num_hashes: int = 64
    weight_power: float = 1.0
    num_steps: int = 100
    batch_size: int = 512

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        widths = [round(2 ** (step / 2)) for step in range(6, 25)]
        full = num_embeddings * embedding_dim * 4
        return widths[:1] + [width for width in widths[1:] if self.with_knob(width).nbytes(num_embeddings, embedding_dim) <= full]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if min(self.width, self.num_layers, self.num_hashes, self.batch_size) < 1 or self.num_steps < 0:
            raise ValueError(
                f"DeepHash has width={self.width}, num_layers={self.num_layers}, num_hashes={self.num_hashes}, batch_size={self.batch_size} and "
                f"num_steps={self.num_steps}. Choose 0 or more steps, and 1 or more of the others."
            )
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(self.sizes(embedding_dim))) * 4 + self.num_hashes * 8

    def sizes(self, embedding_dim: int) -> list[int]:
        """Numbers that go into the first layer, and that come out of each."""
        return [self.num_hashes, *[self.width] * self.num_layers, embedding_dim]

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> DeepHashTable:
        self.nbytes(num_embeddings, embedding_dim)
        return DeepHashTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        # What is left by least squares on random features: the parts of the rows that are kept, p / (p + level), add up to their number.
        # Gradient steps lower it by what depends on their number; this is an upper estimate.
        shares = spread.shares[spread.shares > 0].double()
        if self.width >= len(shares):
            return 0.0
        low, high = -50.0, 10.0  # of the level, as powers of two
        for _ in range(40):
            middle = (low + high) / 2
            too_many = float((shares / (shares + 2**middle)).sum()) > self.width
            low, high = (middle, high) if too_many else (low, middle)
        return float((shares * 2**high / (shares + 2**high)).sum())


class DeepHashTable(Table):
    """`weights` and `biases` of the layers, (outputs, inputs) and (outputs,) float32, trainable. `seeds`: (num_hashes,) int64, frozen."""

    method: DeepHash
    seeds: Tensor

    def __init__(self, method: DeepHash, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.register_buffer("seeds", torch.randint(2**62, (method.num_hashes,), generator=draws))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        square = 1 / 3  # mean square of the numbers that go in
        for inputs, outputs in pairwise(method.sizes(embedding_dim)):
            self.weights.append(nn.Parameter(torch.randn(outputs, inputs, generator=draws) * (inputs * square) ** -0.5))
            self.biases.append(nn.Parameter(torch.zeros(outputs)))
            square = _MISH_SQUARE
        self.weights[-1].data *= 0.01  # the spread of an uncompressed table

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        ids, sample_weights = sample_rows(weights, self.method.width, generator=torch.Generator().manual_seed(self.seed))
        sample = torch.cat([rows[ids[(ids >= start) & (ids < start + len(rows))] - start] for start, rows in self.row_chunks(weight)])
        self._solve(ids, sample, sample_weights)
        if self.method.num_steps:
            self._learn(weight, weights)
            self._solve(ids, sample, sample_weights)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        return F.linear(self._features(ids), self.weights[-1], self.biases[-1])

    def _features(self, ids: Tensor) -> Tensor:
        """What the hidden layers make of ids: (N,) -> (N, width)."""
        numbers = hash_buckets(ids, self.seeds, _HASH_VALUES) * (2 / (_HASH_VALUES - 1)) - 1
        features = numbers.to(self.biases[0].dtype)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            features = F.mish(F.linear(features, weight, bias))
        return features

    @torch.enable_grad()
    def _learn(self, weight: Tensor, weights: Tensor) -> None:
        """Gradient steps of the hidden layers."""
        method, device, draws = self.method, self.seeds.device, torch.Generator().manual_seed(self.seed)
        hidden = [*self.weights[:-1], *self.biases[:-1]]
        optimizer = torch.optim.Adam(hidden)
        edges = weights.double().cumsum(0)
        for step in range(method.num_steps):
            marks = torch.rand(method.batch_size, dtype=torch.float64, generator=draws) * edges[-1]
            rows = torch.searchsorted(edges, marks, right=True).clamp(max=self.num_embeddings - 1)
            target = weight[rows.to(weight.device)].float().to(device)
            # Steps that shrink to nothing leave the layers where they settled; wide layers bear smaller ones.
            optimizer.param_groups[0]["lr"] = min(_MOST_LEARNING_RATE, _LEARNING_RATE / method.width) * (1 - step / method.num_steps)
            loss = F.mse_loss(self.lookup(rows.to(device)), target) / target.var().clamp(min=1e-12)
            for parameter, gradient in zip(hidden, torch.autograd.grad(loss, hidden), strict=True):
                parameter.grad = gradient
            optimizer.step()
        optimizer.zero_grad()

    def _solve(self, ids: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Set the last layer to what has the least squared error, with a small ridge, on the rows (N, D) of ids (N,) with weights (N,)."""
        device = self.seeds.device
        shares = (weights / weights.sum()).to(device).unsqueeze(1)
        features, rows = self._features(ids.to(device)), rows.to(device)
        mean, row_mean = (shares * features).sum(0), (shares * rows).sum(0)
        features, rows = features - mean, rows - row_mean
        covariance = ((shares * features).T @ features).double()
        covariance.diagonal().add_(_RIDGE * covariance.trace() / len(mean) + 1e-12)
        solution = torch.linalg.solve(covariance, ((shares * features).T @ rows).double()).float()
        self.weights[-1].copy_(solution.T)
        self.biases[-1].copy_(row_mean - mean @ solution)
