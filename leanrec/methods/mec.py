"""MEC: product quantization with popularity-weighted code balance and contrastive learning.
Wang et al., A Universal Framework for Compressing Embeddings in CTR Prediction, DASFAA 2025, arXiv 2502.15355.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import row_weights
from leanrec.methods.pq import PQ, PQTable
from leanrec.ops.kmeans import ClusterMeans

LEARNING_RATE = 1e-3
COMMITMENT = 0.25  # van den Oord et al., Neural Discrete Representation Learning, 2017
REVIVE_STEPS = 50  # a code that no row took for so many steps starts again at a row


@dataclass(frozen=True)
class MEC(PQ):
    """Product quantization whose codes are learned with three losses on top of a k-means start, then frozen.

    A row counts with its popularity floor(log2 n), at least 1, n being its occurrences. A linear encoder, dropped afterwards, learns which
    code a row takes; code words live in the table's own space, so the table answers as PQ does. `docs/mec.md` maps the paper's stages to
    these losses and says where and why they differ.

    Attributes:
        reconstruction: Weight of the squared error of a value, in units of the table's mean square; straight-through gradient to the encoder.
        balance: Weight of the divergence between the popularity-weighted mean soft assignment and the uniform one, per subspace in nats.
        contrastive: Weight of InfoNCE between the encoded row, its code words, and the same with one code replaced.
        temperature: Of the contrast (of cosines) and of the soft assignment (of squared distances, in units of a batch's mean smallest one).
        num_negatives: Rows with one replaced code that each row is contrasted with.
        num_steps: Gradient steps; 0 keeps the k-means start.
        batch_size: Rows in a step, drawn by popularity.
    """

    weight_power: float = 1.0
    reconstruction: float = 1.0
    balance: float = 0.02
    contrastive: float = 0.02
    temperature: float = 0.1
    num_negatives: int = 4
    num_steps: int = 300
    batch_size: int = 512

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if self.temperature <= 0 or min(self.num_negatives, self.batch_size) < 1 or self.num_steps < 0:
            raise ValueError(
                f"MEC has temperature={self.temperature}, num_negatives={self.num_negatives}, batch_size={self.batch_size}, "
                f"num_steps={self.num_steps}. The first must be above 0, the next two at least 1, the last at least 0."
            )
        if min(self.reconstruction, self.balance, self.contrastive) < 0:
            raise ValueError(
                f"MEC has reconstruction={self.reconstruction}, balance={self.balance}, contrastive={self.contrastive}. "
                "A weight of a loss is 0 or more."
            )
        return super().nbytes(num_embeddings, embedding_dim)

    @property
    def streaming_gap(self) -> str | None:
        return "its steps draw rows from all over the table; PQ is the k-means it starts from"

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> MECTable:
        self.nbytes(num_embeddings, embedding_dim)
        return MECTable(self, num_embeddings, embedding_dim, generator=generator)


class MECTable(PQTable):
    """What `PQTable` stores; only the fit differs."""

    method: MEC

    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        popular = None if counts is None else popularity(counts)
        super().fit(weight, popular)
        if self.method.num_steps and self.num_centroids < self.num_embeddings:
            self._learn(weight, row_weights(popular, self.num_embeddings, power=self.method.weight_power))
        return self

    def _learn(self, weight: Tensor, weights: Tensor) -> None:
        """Improve code books and codes from where k-means left them."""
        method, generator = self.method, torch.Generator().manual_seed(self.seed)
        scale = _root_mean_square(self.row_chunks(weight), weights)
        learner = _Learner(self.codebooks.detach() / scale)
        optimizer = torch.optim.Adam(learner.parameters(), lr=LEARNING_RATE)
        edges = weights.double().cumsum(0)
        with torch.enable_grad():
            for step in range(1, method.num_steps + 1):
                marks = torch.rand(method.batch_size, generator=generator, dtype=torch.float64) * edges[-1]
                rows = torch.searchsorted(edges, marks, right=True).clamp(max=self.num_embeddings - 1)
                points = weight[rows.to(weight.device)].float() / scale
                # Steps that shrink to nothing leave the code words where they settled, not where the last batch pushed them.
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / method.num_steps)
                optimizer.zero_grad()
                learner.loss(points, method, generator).backward()
                optimizer.step()
                if step % REVIVE_STEPS == 0 and step < method.num_steps:
                    learner.revive(points)
        self._freeze(learner, weight, weights, scale)

    @torch.no_grad()
    def _freeze(self, learner: _Learner, weight: Tensor, weights: Tensor, scale: Tensor) -> None:
        """Store the code of every row; each code word becomes the mean of its rows, which has the least squared error for these codes."""
        means = [ClusterMeans(words * scale) for words in learner.codebooks.detach()]
        for start, rows in self.row_chunks(weight, chunk_rows=16_384):
            codes = learner.distances(learner.encode(rows / scale)).argmin(-1)  # (M, B)
            for mean, part, taken in zip(means, self._split(rows), codes, strict=True):
                mean.add(part, taken, weights[start : start + len(rows)].to(rows.device))
            self.set_codes(codes.t(), start=start)
        self.codebooks.copy_(torch.stack([mean.value() for mean in means]))


class _Learner(nn.Module):
    """Encoder (D, D) and code books (M, K, D / M) while they are learned."""

    def __init__(self, codebooks: Tensor) -> None:
        super().__init__()
        num_subspaces, num_centroids, width = codebooks.shape
        self.encoder = nn.Parameter(torch.eye(num_subspaces * width))
        self.codebooks = nn.Parameter(codebooks.clone())
        self.used = torch.zeros(num_subspaces, num_centroids, dtype=torch.bool)

    def encode(self, points: Tensor) -> Tensor:
        """Latent sub-vectors: (B, D) -> (M, B, D / M)."""
        num_subspaces, _, width = self.codebooks.shape
        return (points @ self.encoder).view(len(points), num_subspaces, width).transpose(0, 1)

    def distances(self, latent: Tensor) -> Tensor:
        """Squared distances to the code words: (M, B, K)."""
        words = self.codebooks
        return latent.square().sum(-1, keepdim=True) - 2 * latent @ words.transpose(1, 2) + words.square().sum(-1).unsqueeze(1)

    def words(self, codes: Tensor) -> Tensor:
        """Code words of codes: (M, B) -> (M, B, D / M)."""
        return self.codebooks.gather(1, codes.unsqueeze(-1).expand(-1, -1, self.codebooks.shape[-1]))

    def loss(self, points: Tensor, method: MEC, generator: torch.Generator) -> Tensor:
        """The weighted sum of the losses of a batch of rows: (B, D) -> ()."""
        latent = self.encode(points)
        distances = self.distances(latent)
        codes = distances.argmin(-1)
        self.used.scatter_(1, codes, True)
        words = self.words(codes)
        total = method.reconstruction * reconstruction_loss(points, latent, words)
        if method.balance:
            total = total + method.balance * balance_loss(distances, method.temperature)
        if method.contrastive:
            replaced = torch.stack([self.words(replace_one(codes, self.codebooks.shape[1], generator)) for _ in range(method.num_negatives)])
            total = total + method.contrastive * contrastive_loss(latent, words, replaced, method.temperature)
        return total

    @torch.no_grad()
    def revive(self, points: Tensor) -> None:
        """Move every code that no row took since the last call to the rows that their code words fit worst."""
        latent = self.encode(points)
        errors = self.distances(latent).amin(-1)  # (M, B)
        for subspace, dead in enumerate((~self.used).unbind()):
            worst = errors[subspace].topk(min(int(dead.sum()), len(points))).indices
            self.codebooks[subspace, dead.nonzero().flatten()[: len(worst)]] = latent[subspace, worst]
        self.used.zero_()


def popularity(counts: Tensor) -> Tensor:
    """The paper's weight of a row: floor(log2 n), at least 1. (V,) int64 -> (V,) int64."""
    return counts.clamp(min=2).double().log2().floor().long()


def reconstruction_loss(points: Tensor, latent: Tensor, words: Tensor) -> Tensor:
    """Squared error of the rows per dimension, to the code words directly and to the encoder straight through; and the commitment of the encoder.

    Args:
        points: (B, D) rows.
        latent: (M, B, D / M) what the encoder made of them.
        words: (M, B, D / M) the nearest code words.
    """
    through = words + latent - latent.detach()
    target = points.view(len(points), len(words), -1).transpose(0, 1)
    return F.mse_loss(through, target) + COMMITMENT * F.mse_loss(latent, words.detach())


def balance_loss(distances: Tensor, temperature: float) -> Tensor:
    """KL(mean soft assignment || uniform) in nats, mean over subspaces; 0 when all codes are used alike.

    The batch is drawn by popularity, so the mean over it is the popularity-weighted one.

    Args:
        distances: (M, B, K) squared distances.
        temperature: Of the soft assignment, times the mean smallest distance: what is near does not depend on K or D.
    """
    scale = temperature * distances.detach().amin(-1).mean().clamp(min=1e-12)
    usage = (-distances / scale).softmax(-1).mean(1)  # (M, K)
    return (usage * usage.clamp(min=1e-12).log()).sum(-1).mean() + math.log(distances.shape[-1])


def contrastive_loss(latent: Tensor, words: Tensor, replaced: Tensor, temperature: float) -> Tensor:
    """InfoNCE: the encoded row is to be nearer, in angle, to its own code words than to those with one code replaced.

    Args:
        latent: (M, B, D / M) anchors.
        words: (M, B, D / M) positives.
        replaced: (negatives, M, B, D / M) code words of the same codes but for one.
        temperature: Of the cosines.
    """
    anchor = latent.transpose(0, 1).flatten(1)  # (B, D)
    candidates = torch.cat([words.unsqueeze(0), replaced]).transpose(1, 2).flatten(2)  # (1 + negatives, B, D)
    logits = F.cosine_similarity(anchor.unsqueeze(0), candidates, dim=-1).t() / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def replace_one(codes: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """The same codes with one index of each row replaced by another one, drawn evenly: (M, B) -> (M, B)."""
    num_subspaces, num_rows = codes.shape
    subspaces = torch.randint(num_subspaces, (num_rows,), generator=generator)
    shifts = torch.randint(1, num_centroids, (num_rows,), generator=generator)
    rows = torch.arange(num_rows)
    negatives = codes.clone()
    negatives[subspaces, rows] = (codes[subspaces, rows] + shifts) % num_centroids
    return negatives


def _root_mean_square(chunks: Iterable[tuple[int, Tensor]], weights: Tensor) -> Tensor:
    """Weighted root mean square of the values of a table, ()."""
    total = sum((weights[start : start + len(rows)].to(rows.device) @ rows.square().mean(1) for start, rows in chunks), start=torch.zeros(()))
    return (total / weights.sum()).sqrt().clamp(min=1e-12)
