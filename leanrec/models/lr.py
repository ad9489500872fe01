"""Logistic regression. Richardson, Dominowska and Ragno, Predicting Clicks, WWW 2007, doi:10.1145/1242572.1242643."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import FieldEmbedding


class LR(nn.Module):
    """One weight per field value, summed: a V x 1 table per vocabulary and nothing else."""

    def __init__(self, schema: Schema, *, embedding_dim: int = 1, embedding_std: float = 1e-4) -> None:
        super().__init__()
        if embedding_dim != 1:
            raise ValueError(f"LR keeps one weight per id, so embedding_dim={embedding_dim} must be 1. Leave it out.")
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        return self.embedding(features).flatten(1).sum(1) + self.bias
