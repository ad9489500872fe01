"""Factorization machine. Rendle, ICDM 2010, doi:10.1109/ICDM.2010.127."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import FieldEmbedding, FirstOrder


class FM(nn.Module):
    """First-order term plus the inner products of all pairs of fields."""

    def __init__(self, schema: Schema, *, embedding_dim: int = 16, linear: str = "projection", embedding_std: float = 1e-4) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        self.first_order = FirstOrder(schema, embedding_dim, linear=linear, embedding_std=embedding_std)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        embeddings = self.embedding(features)
        return self.first_order(features, embeddings) + sum_of_products(embeddings)


def sum_of_products(embeddings: Tensor) -> Tensor:
    """Inner products of all pairs of fields, summed: (B, F, D) -> (B,); the paper's Lemma 3.1, in time linear in F."""
    return 0.5 * (embeddings.sum(1).square().sum(1) - torch.linalg.vector_norm(embeddings.flatten(1), dim=1).square())  # writes no square down
