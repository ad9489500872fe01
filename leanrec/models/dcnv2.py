"""DCN V2. Wang, Shivanna, Cheng, Jain, Lin, Hong and Chi, WWW 2021, arXiv 2008.13535. Full-rank cross layers, not the mixture of low-rank experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanrec.data.schema import Schema
from leanrec.models.layers import MLP, FieldEmbedding, require_choice, require_positive


class DCNv2(nn.Module):
    """A cross network and a perceptron over the concatenated vectors, side by side or the second on top of the first."""

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        structure: str = "parallel",
        num_cross_layers: int = 3,
        hidden_units: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        embedding_std: float = 1e-4,
    ) -> None:
        super().__init__()
        require_choice("structure", structure, ("parallel", "stacked"))
        self.structure = structure
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        width = len(schema.fields) * embedding_dim
        self.cross = CrossNetwork(width, num_cross_layers)
        self.deep = MLP(width, hidden_units, dropout=dropout, batch_norm=batch_norm)
        self.output = nn.Linear(self.deep.output_dim + (width if structure == "parallel" else 0), 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        x0 = self.embedding(features).flatten(1)
        crossed = self.cross(x0)
        hidden = self.deep(crossed) if self.structure == "stacked" else torch.cat([crossed, self.deep(x0, features)], dim=1)
        return self.output(hidden).squeeze(1)


class CrossNetwork(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l: (B, width) -> (B, width)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        require_positive("num_cross_layers", num_layers)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, x0: Tensor) -> Tensor:
        """Feature crosses up to order num_layers + 1."""
        x = x0
        for layer in self.layers:
            x = torch.addcmul(x, x0, layer(x))
        return x
