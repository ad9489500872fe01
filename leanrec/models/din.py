"""Deep interest network (DIN). Zhou, Zhu, Song, Fan, Zhu, Ma, Yan, Jin, Li and Gai, KDD 2018, arXiv 1706.06978."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.data.schema import PADDING_ID, Field, Schema
from leanrec.models.layers import MLP, FieldEmbedding, require_choice


class DIN(nn.Module):
    """A perceptron over the vectors, where the behaviours of a sequence are summed by how much each has to do with the target.

    A sequence without a target is averaged, as all other lists are. The mini-batch aware regularization of the paper (its section 5.1)
    is a matter of the training loop and not part of the model.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        attention_units: Sequence[int] = (36,),
        hidden_units: Sequence[int] = (200, 80),
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: str = "dice",
        targets: Mapping[str, str] | None = None,
        embedding_std: float = 1e-4,
    ) -> None:
        """An untrained model.

        Args:
            schema: The fields; at least one sequence shares its vocabulary with a categorical field.
            embedding_dim: D.
            attention_units: Hidden layers of the activation unit.
            hidden_units: Hidden layers of the perceptron.
            dropout: Of the perceptron.
            batch_norm: Of the perceptron.
            activation: "dice" or "prelu", in the activation unit and in the perceptron.
            targets: Sequence -> the categorical field its behaviours are held against; None: the first one that shares its vocabulary.
            embedding_std: As in `FieldEmbedding`.

        Raises:
            ValueError: No sequence has a target, or `targets` names a pair that does not fit.
        """
        super().__init__()
        require_choice("activation", activation, ("dice", "prelu"))
        make_activation: Callable[[int], nn.Module] = Dice if activation == "dice" else nn.PReLU
        self.embedding = FieldEmbedding(schema, embedding_dim, embedding_std=embedding_std)
        self.targets = _targets(schema, targets or {})
        self.units = nn.ModuleList(ActivationUnit(embedding_dim, attention_units, make_activation) for _ in self.targets)
        width = len(schema.fields) * embedding_dim
        self.deep = MLP(width, hidden_units, output_dim=1, dropout=dropout, batch_norm=batch_norm, activation=make_activation)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B,)."""
        fields = self.embedding.fields
        vectors = {field.name: self.embedding.embed(field, features[field.name]) for field in fields if field.name not in self.targets}
        units = dict(zip(self.targets, self.units, strict=True))
        for field in fields:
            if field.name in self.targets:
                target = vectors[self.targets[field.name]]
                vectors[field.name] = units[field.name](features[field.name], self.embedding.table(field), target)
        return self.deep(torch.cat([vectors[field.name] for field in fields], dim=1)).squeeze(1)


class ActivationUnit(nn.Module):
    """sum_j a(e_j, v) e_j over the behaviours e_j of a row and its target v, the paper's equation 3, without softmax as there.

    a is a perceptron over e_j, v, their difference and their element-wise product, as in the authors' code; the figure in the paper has
    an outer product, D x D numbers, in the place of the last two. Padding is left out before a, so that it counts in no statistics.
    """

    def __init__(self, embedding_dim: int, hidden_units: Sequence[int], activation: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.relevance = MLP(4 * embedding_dim, hidden_units, output_dim=1, activation=activation)

    def forward(self, ids: Tensor, table: nn.Module, target: Tensor) -> Tensor:
        """(B, D) from ids (B, L), the table they are looked up in, and target (B, D)."""
        rows, positions = (ids != PADDING_ID).nonzero(as_tuple=True)
        behaviours = table(ids[rows, positions])  # (N, D), N behaviours in the whole batch
        wanted = target.index_select(0, rows)
        relevance = self.relevance(torch.cat([behaviours, wanted, behaviours - wanted, behaviours * wanted], dim=1))
        return torch.zeros_like(target).index_add(0, rows, relevance * behaviours)


class Dice(nn.Module):
    """p(s) s + (1 - p(s)) alpha s with p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + 1e-8)): (N, width) -> (N, width).

    Mean and variance are those of the batch in training (of fewer than two rows there are none, and the running ones serve) and running
    averages otherwise.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, s: Tensor) -> Tensor:
        """Between the identity (s far above its mean) and alpha times s (far below)."""
        if self.training and len(s) > 1:
            normalized = F.batch_norm(s, self.mean, self.variance, training=True, eps=1e-8)
        else:
            normalized = (s - self.mean) * torch.rsqrt(self.variance + 1e-8)
        return torch.lerp(self.alpha.to(s.dtype) * s, s, normalized.sigmoid().to(s.dtype))  # under autocast, s alone is of lower precision


def _targets(schema: Schema, chosen: Mapping[str, str]) -> dict[str, str]:
    """Sequence -> target field."""
    candidates = {field.name: _sharing(field, schema) for field in schema.fields if field.kind == "sequence"}
    for sequence, target in chosen.items():
        if target not in candidates.get(sequence, []):
            raise ValueError(
                f"targets={{{sequence!r}: {target!r}}} does not fit: DIN holds a sequence against a categorical field of the same vocabulary. "
                f"The schema offers {candidates}."
            )
    if not any(candidates.values()):
        raise ValueError(
            f"DIN needs a sequence field that shares its vocabulary with a categorical field, its target; the schema's sequence fields are "
            f"{list(candidates)}. Give the two columns the same vocabulary in `leanrec prepare`, or choose another model."
        )
    return {sequence: chosen.get(sequence, names[0]) for sequence, names in candidates.items() if names}


def _sharing(sequence: Field, schema: Schema) -> list[str]:
    return [field.name for field in schema.fields if field.kind == "categorical" and field.vocabulary == sequence.vocabulary]
