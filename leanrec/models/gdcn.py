"""Gated deep cross network (GDCN). Wang, Gu, Lu, Peng, Liu, Gu and Yuan, CIKM 2023, arXiv 2311.04635; its parallel form, GDCN-P."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import MLP, FieldEmbedding, require_positive


class GDCNP(nn.Module):
    """A gated cross network and a perceptron, side by side over the concatenated vectors."""

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        num_cross_layers: int = 3,
        hidden_units: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        embedding_std: float = 1e-4,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        width = len(schema.fields) * embedding_dim
        self.cross = GatedCrossNetwork(width, num_cross_layers)
        self.deep = MLP(width, hidden_units, dropout=dropout, batch_norm=batch_norm)
        self.output = nn.Linear(width + self.deep.output_dim, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        c0 = self.embedding(features).flatten(1)
        return self.output(torch.cat([self.cross(c0), self.deep(c0, features)], dim=1)).squeeze(1)


class GatedCrossNetwork(nn.Module):
    """c_{l+1} = c_0 * (W_c c_l + b) * sigmoid(W_g c_l) + c_l: (B, width) -> (B, width)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        require_positive("num_cross_layers", num_layers)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))

    def forward(self, c0: Tensor) -> Tensor:
        """Feature crosses up to order num_layers + 1, each let through as far as its gate opens."""
        c = c0
        for layer, gate in zip(self.layers, self.gates, strict=True):
            c = torch.addcmul(c, c0, layer(c) * gate(c).sigmoid())
        return c
