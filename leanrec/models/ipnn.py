"""Inner-product neural network (IPNN). Qu, Cai, Ren, Zhang, Yu, Wen and Wang, ICDM 2016, arXiv 1611.00144."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import MLP, FieldEmbedding


class IPNN(nn.Module):
    """A perceptron over the vectors and the inner products of all pairs of fields.

    The first layer has a full weight for the products, where the paper factorizes it to save time for many fields, and products of
    a field with itself are left out, as in the FuxiCTR code behind the BARS figures.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        hidden_units: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        embedding_std: float = 1e-4,
    ) -> None:
        super().__init__()
        num_fields = len(schema.fields)
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        width = num_fields * embedding_dim + num_fields * (num_fields - 1) // 2
        self.deep = MLP(width, hidden_units, output_dim=1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        embeddings = self.embedding(features)
        num_fields = embeddings.shape[1]
        left, right = torch.triu_indices(num_fields, num_fields, offset=1, device=embeddings.device)
        products = torch.bmm(embeddings, embeddings.transpose(1, 2)).flatten(1).index_select(1, left * num_fields + right)  # (B, F(F-1)/2)
        return self.deep(torch.cat([embeddings.flatten(1), products], dim=1)).squeeze(1)
