"""DeepFM. Guo, Tang, Ye, Li and He, IJCAI 2017, arXiv 1703.04247."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.fm import sum_of_products
from leanrec.models.layers import MLP, FieldEmbedding, FirstOrder


class DeepFM(nn.Module):
    """A factorization machine and a perceptron over the same vectors, summed."""

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        hidden_units: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        linear: str = "projection",
        embedding_std: float = 1e-4,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        self.first_order = FirstOrder(schema, embedding_dim, linear=linear, embedding_std=embedding_std)
        self.deep = MLP(len(schema.fields) * embedding_dim, hidden_units, output_dim=1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        embeddings = self.embedding(features)
        return self.first_order(features, embeddings) + sum_of_products(embeddings) + self.deep(embeddings.flatten(1), features).squeeze(1)
