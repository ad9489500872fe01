"""What the reference models share: fields to vectors, the first-order term and the multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from leanrec.data.schema import PADDING_ID, Field, Schema, module_key


class FieldEmbedding(nn.Module):
    """One vector per field: features -> (B, F, D) float32, fields in the schema's order.

    An id is looked up; the ids of a list are looked up and averaged, padding not counted, an empty list giving zeros; a number
    scales its field's vector, a missing one has a vector of its own. Fields that name one vocabulary share its table.

    Tables are called as `table(ids)` and in no other way, so any module of that form can stand in their place.

    Attributes:
        tables: Vocabulary -> its table, V x D with a zero row for padding and sparse gradients. A "." of the name is written "_",
            and a name that `nn.ModuleDict` keeps for itself ("items", "type") gets a "_" at its end.
        numeric: Numeric field -> its two vectors; names as in `tables`.
    """

    def __init__(self, schema: Schema, embedding_dim: int, *, embedding_std: float = 1e-4) -> None:
        """An untrained field layer.

        Args:
            schema: The fields.
            embedding_dim: D.
            embedding_std: Standard deviation of the initial values. 1e-4 is what FuxiCTR, the code of the BARS benchmark, and DeepCTR use:
                ids that training hardly sees then stay near zero and add no noise.

        Raises:
            ValueError: No fields, an embedding_dim below 1, an embedding_std below 0, a field of ids without a table, or two names that become one
                module name.
        """
        super().__init__()
        if not schema.fields:
            raise ValueError("The schema has no fields. A model needs at least one.")
        require_positive("embedding_dim", embedding_dim)
        require_deviation("embedding_std", embedding_std)
        for field in schema.fields:
            _check_table(field, schema)
        self.fields = schema.fields
        vocabularies = schema.vocabularies
        self._vocabulary_keys = module_names(list(vocabularies))
        self._numeric_keys = module_names([field.name for field in schema.fields if field.kind == "numeric"])
        self.tables = nn.ModuleDict({self._vocabulary_keys[name]: _table(size, embedding_dim, embedding_std) for name, size in vocabularies.items()})
        self.numeric = nn.ModuleDict({key: NumericVectors(embedding_dim, embedding_std=embedding_std) for key in self._numeric_keys.values()})

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Vectors of all fields: (B, F, D). For `features` see `leanrec.data.batch.Batch`."""
        return torch.stack([self.embed(field, features[field.name]) for field in self.fields], dim=1)

    def embed(self, field: Field, values: Tensor) -> Tensor:
        """Vectors of one field, (B, D), from its (B,) ids, (B, L) ids or (B,) numbers."""
        if field.kind == "numeric":
            return self.numeric[self._numeric_keys[field.name]](values)
        vectors = self.table(field)(values)
        return masked_mean(vectors, values != PADDING_ID) if field.is_list else vectors

    def table(self, field: Field) -> nn.Module:
        """The table in which a categorical, multivalued or sequence field is looked up."""
        return self.tables[self._vocabulary_keys[field.vocabulary or ""]]


class NumericVectors(nn.Module):
    """A number as a vector: value times a learned vector, or another learned vector where it is missing (NaN)."""

    def __init__(self, embedding_dim: int, *, embedding_std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(embedding_dim).normal_(std=embedding_std))
        self.missing = nn.Parameter(torch.empty(embedding_dim).normal_(std=embedding_std))

    def forward(self, values: Tensor) -> Tensor:
        """(B,) float -> (B, D)."""
        is_missing = values.isnan()
        known = values.masked_fill(is_missing, 0.0)  # before the product: NaN times a zero gradient is NaN
        return torch.where(is_missing.unsqueeze(1), self.missing, known.unsqueeze(1) * self.scale)


class FirstOrder(nn.Module):
    """The linear term of a model, with its bias: one weight per field value, summed over the fields.

    `linear="projection"` takes the weight of an id from its vector, <p_field, e_id>, with one learned p per field. `linear="table"` is the
    papers' free weight per id, a V x 1 table per vocabulary at `weights.tables`. We depart from the papers by default: a second table
    of V floats is left whole by every compressor of vectors, which caps the ratio of a model near D + 1 whatever the method, and it
    doubles the random accesses to memory per row. What it adds to a vector of D numbers is one more.
    """

    def __init__(self, schema: Schema, embedding_dim: int, *, linear: str = "projection", embedding_std: float = 1e-4) -> None:
        super().__init__()
        require_choice("linear", linear, ("projection", "table"))
        self.linear = linear
        self.weights: nn.Module
        if linear == "table":
            self.weights = FieldEmbedding(schema, 1, embedding_std=embedding_std)
        else:
            self.weights = nn.Linear(len(schema.fields) * embedding_dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        """(B,) from the features and their vectors (B, F, D)."""
        weights = self.weights(features) if self.linear == "table" else self.weights(embeddings.flatten(1))
        return weights.flatten(1).sum(1) + self.bias


class MLP(nn.Sequential):
    """Hidden layers (linear, batch norm, activation, dropout) and, with `output_dim`, a plain linear layer: (B, input_dim) -> (B, output_dim).

    Attributes:
        output_dim: Width of the result.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_units: Sequence[int],
        *,
        output_dim: int | None = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """An untrained perceptron; `activation` makes the module for a layer of a given width (None: ReLU).

        Raises:
            ValueError: hidden_units is no list of positive integers, dropout no share, or batch_norm neither True nor False.
        """
        super().__init__()
        if not isinstance(hidden_units, (list, tuple)) or not all(_is_count(width) for width in hidden_units):
            raise ValueError(f"hidden_units={hidden_units!r} must be a list of positive integers, e.g. [256, 128].")
        require_share("dropout", dropout)
        require_bool("batch_norm", batch_norm)
        for width in hidden_units:
            self.append(nn.Linear(input_dim, width))
            if batch_norm:
                self.append(nn.BatchNorm1d(width))
            self.append(nn.ReLU() if activation is None else activation(width))
            if dropout:
                self.append(nn.Dropout(dropout))
            input_dim = width
        if output_dim is not None:
            self.append(nn.Linear(input_dim, output_dim))
            input_dim = output_dim
        self.output_dim = input_dim

    def forward(self, input: Tensor, features: dict[str, Tensor] | None = None) -> Tensor:
        """(B, input_dim) -> (B, output_dim). What stands in its place after `leanrec.merge` asks for the features whose vectors the input is."""
        return super().forward(input)


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean of the vectors that a mask keeps: (B, L, D) and (B, L) bool -> (B, D), zeros where it keeps none."""
    shares = mask.to(vectors.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.bmm(shares.unsqueeze(1), vectors).squeeze(1)


def require_choice(setting: str, given: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless a setting is one of its choices."""
    if given not in choices:
        raise ValueError(f"{setting}={given!r} is unknown. Choose one of {list(choices)}.")


def require_positive(setting: str, given: int) -> None:
    """Raise ValueError unless a setting is an integer above zero."""
    if not _is_count(given):
        raise ValueError(f"{setting}={given!r} must be an integer, 1 or more.")


def require_deviation(setting: str, given: float) -> None:
    """Raise ValueError unless a setting is a finite number, zero or above."""
    if not _is_number(given) or not 0 <= given < math.inf:
        raise ValueError(f"{setting}={given!r} must be a number, 0 or more, such as 0.0001.")


def require_share(setting: str, given: float) -> None:
    """Raise ValueError unless a setting is a number from 0 to below 1."""
    if not _is_number(given) or not 0 <= given < 1:
        raise ValueError(f"{setting}={given!r} must be a share, a number from 0 to below 1, such as 0.2.")


def require_bool(setting: str, given: bool) -> None:
    """Raise ValueError unless a setting is True or False."""
    if not isinstance(given, bool):
        raise ValueError(f"{setting}={given!r} must be True or False.")


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given > 0


def _is_number(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def _check_table(field: Field, schema: Schema) -> None:
    if field.kind == "numeric":
        return
    if field.vocabulary is None:
        raise ValueError(f"Field {field.name!r}: kind {field.kind!r} needs a vocabulary, but the schema gives none.")
    if field.num_embeddings != (expected := schema.vocabularies[field.vocabulary]) or expected <= PADDING_ID:
        raise ValueError(
            f"Field {field.name!r}: num_embeddings={field.num_embeddings} for vocabulary {field.vocabulary!r}. "
            "All fields of one vocabulary need the same number, at least 1."
        )


def module_names(names: list[str]) -> dict[str, str]:
    """Name -> what `nn.ModuleDict` can call it: "." becomes "_", and a name that it keeps for itself ends in one more "_".

    Raises:
        ValueError: Two names become the same.
    """
    reserved = nn.ModuleDict()
    keys: dict[str, str] = {}
    for name in names:
        key = module_key(name)
        key = f"{key}_" if hasattr(reserved, key) else key
        if twin := next((other for other, taken in keys.items() if taken == key), None):
            raise ValueError(f"{twin!r} and {name!r} both become the module name {key!r}. Rename one of the two.")
        keys[name] = key
    return keys


def _table(num_embeddings: int, embedding_dim: int, embedding_std: float) -> nn.Embedding:
    weight = torch.empty(num_embeddings, embedding_dim).normal_(std=embedding_std)
    weight[PADDING_ID] = 0
    return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=PADDING_ID, sparse=True)
