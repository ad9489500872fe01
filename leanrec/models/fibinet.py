"""FiBiNET. Huang, Zhang and Zhang, RecSys 2019, arXiv 1905.09433."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import MLP, FieldEmbedding, FirstOrder, require_choice, require_positive


class FiBiNET(nn.Module):
    """A perceptron over bilinear interactions of the vectors and of the vectors reweighted by field (SENET), plus a first-order term.

    Both sets of vectors go through one bilinear layer, as in the public implementations (FuxiCTR, DeepCTR).
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        bilinear: str = "interaction",
        reduction_ratio: int = 3,
        hidden_units: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        linear: str = "projection",
        embedding_std: float = 1e-4,
    ) -> None:
        super().__init__()
        num_fields = len(schema.fields)
        if num_fields < 2:
            raise ValueError("FiBiNET multiplies pairs of fields, but the schema has one field. Give two or more.")
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        self.first_order = FirstOrder(schema, embedding_dim, linear=linear, embedding_std=embedding_std)
        self.senet = SENET(num_fields, reduction_ratio)
        self.bilinear = BilinearInteraction(num_fields, embedding_dim, bilinear)
        width = num_fields * (num_fields - 1) * embedding_dim  # the pairs, twice
        self.deep = MLP(width, hidden_units, output_dim=1, dropout=dropout, batch_norm=batch_norm)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        embeddings = self.embedding(features)
        products = torch.cat([self.bilinear(embeddings), self.bilinear(self.senet(embeddings))], dim=1)
        return self.first_order(features, embeddings) + self.deep(products.flatten(1)).squeeze(1)


class SENET(nn.Module):
    """Squeeze and excitation of fields: each field's vector times a weight made from the means of all of them; (B, F, D) -> (B, F, D)."""

    def __init__(self, num_fields: int, reduction_ratio: int) -> None:
        super().__init__()
        require_positive("reduction_ratio", reduction_ratio)
        reduced = max(1, num_fields // reduction_ratio)
        self.excite = nn.Sequential(nn.Linear(num_fields, reduced, bias=False), nn.ReLU(), nn.Linear(reduced, num_fields, bias=False), nn.ReLU())

    def forward(self, embeddings: Tensor) -> Tensor:
        """The vectors, reweighted."""
        return embeddings * self.excite(embeddings.mean(2)).unsqueeze(2)


class BilinearInteraction(nn.Module):
    """(v_i W) * v_j for all pairs i < j: (B, F, D) -> (B, F (F - 1) / 2, D).

    W is one matrix for all pairs with kind "all", one per left field with "each", one per pair with "interaction".
    """

    def __init__(self, num_fields: int, embedding_dim: int, kind: str) -> None:
        super().__init__()
        require_choice("bilinear", kind, ("all", "each", "interaction"))
        per_field = {"all": [1], "each": [1] * (num_fields - 1), "interaction": list(range(num_fields - 1, 0, -1))}[kind]
        self.num_matrices = per_field  # of each left field; "all": of all of them
        self.weight = nn.Parameter(torch.empty(sum(per_field), embedding_dim, embedding_dim).normal_(std=embedding_dim**-0.5))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Products of all pairs, ordered (0, 1), (0, 2), ..., (1, 2), ..."""
        num_left = embeddings.shape[1] - 1
        weights = self.weight.split(self.num_matrices)
        weights = weights * num_left if len(weights) == 1 else weights
        # One field on the left at a time against all fields after it: matrix products without a copy of every pair.
        rotated = [torch.einsum("bd,nde->bne", embeddings[:, i], weights[i]) for i in range(num_left)]
        return torch.cat([rotated[i] * embeddings[:, i + 1 :] for i in range(num_left)], dim=1)
