"""Models made faster for inference: linear layers over the vectors of fields, multiplied with what the tables are made of.

The merging of an expansion into the layer after it is that of Yu et al., KDD 2024, arXiv 2405.18146; with the words of code books, it is how
Jegou, Douze and Schmid, TPAMI 2011, compute inner products with coded vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods import Table
from leanrec.models.dcnv2 import DCNv2
from leanrec.models.deepfm import DeepFM
from leanrec.models.gdcn import GDCNP
from leanrec.models.layers import FieldEmbedding
from leanrec.ops import fused

_WORD_COST = 4  # a word has to be fetched, a row is there: adding up a value takes as long as about so many products

_MODELS = (DeepFM, DCNv2, GDCNP)


def merge(model: nn.Module) -> nn.Module:
    """The model for inference alone, in place: its first dense layer is multiplied with the code books and axes of its tables.

    A layer of H outputs that takes the rows of a table of M code books of K words, side by side or summed, is then a sum of M vectors of H
    numbers instead of D x H products; one that takes rows of R coordinates is R x H products. Answers stay the same but for rounding. The
    model takes M x K x H x 4 bytes of memory for each field of such words. Fields of other tables, tables that gain nothing (M >= D / 4 or
    R + 1 >= D), lists and numbers are multiplied as before.

    The model can no longer be trained, and no longer be saved or compressed: do that before.

    Args:
        model: DeepFM, DCNv2 (not stacked) or GDCN-P. The look-up kernel adds up words of float32 on a CPU; torch adds up others.

    Returns:
        The same model, in evaluation mode, its parameters without gradients.

    Raises:
        ValueError: The model is another one, or none of its tables can be merged.
    """
    is_stacked = isinstance(model, DCNv2) and model.structure == "stacked"
    if not isinstance(model, _MODELS) or type(model) not in _MODELS or is_stacked:  # a class derived from them may have a forward of its own
        raise ValueError(f"{type(model).__name__} has no dense layer of the vectors of fields alone. DeepFM, DCNv2 (not stacked) and GDCNP have one.")
    layer = next(model.deep.children(), None)
    if isinstance(layer, MergedLinear):
        raise ValueError("the model is merged already.")
    if type(layer) is not nn.Linear:
        raise ValueError(f"the first dense layer is {'missing' if layer is None else f'a {type(layer).__name__}'}. Only an nn.Linear can be merged.")
    merged = MergedLinear(layer, model.embedding)
    if not merged.sums and not merged.coordinates:
        width = layer.in_features // len(model.embedding.fields)
        raise ValueError(
            f"nothing to merge: no field of ids has a table of less than {width / 4:g} code books (PQ, RQ, MEC, DPQ: num_subspaces, num_levels) "
            f"or {width - 1} coordinates (LowRank, SmallDim)."
        )
    model.set_submodule("deep", MergedMLP(merged, nn.Sequential(*list(model.deep)[1:])))
    return model.eval().requires_grad_(False)


class MergedMLP(nn.Module):
    """A perceptron whose first layer is merged."""

    def __init__(self, first: MergedLinear, rest: nn.Sequential) -> None:
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, input: Tensor, features: dict[str, Tensor]) -> Tensor:
        """What the perceptron makes of the vectors of `features`: (B, F * D) -> (B, output_dim)."""
        return self.rest(self.first(input, features))


class MergedLinear(nn.Module):
    """A linear layer over the vectors of fields that knows what becomes of the words and axes of their tables.

    Attributes:
        sums: Place of a field -> its table as sums of words, each of which is (H,), what the layer makes of a word; number of rows; padding.
        coordinates: Place of a field -> (V, R), padding.
        others: Places of the other fields.
        weight: (H, N), of the vectors of `others`, then of each `coordinates` and a one.
        bias: (H,).
    """

    unchangeable = "a merged model is for inference alone: save, compress and report a model before leanrec.merge."

    def __init__(self, layer: nn.Linear, embedding: FieldEmbedding) -> None:
        super().__init__()
        self.names = [field.name for field in embedding.fields]
        self.sums: dict[int, tuple[fused.Coded, int, int | None]] = {}
        self.coordinates: dict[int, tuple[Tensor, int | None]] = {}
        self.others: list[int] = []
        zeros = layer.weight.new_zeros(layer.out_features)
        self.bias = zeros if layer.bias is None else layer.bias.detach().clone()
        weights, weights_of_axes = [zeros.new_empty(layer.out_features, 0)], []
        for place, (field, weight) in enumerate(zip(embedding.fields, layer.weight.detach().chunk(len(embedding.fields), dim=1), strict=True)):
            table = embedding.table(field) if field.kind == "categorical" else None
            if isinstance(table, Table) and (sums := _sums(table, weight)) is not None:
                self.sums[place] = (sums, table.num_embeddings, table.padding_idx)
            elif isinstance(table, Table) and (axes := table.axes()) is not None:
                coordinates, basis, mean = (values.detach() for values in axes)
                self.coordinates[place] = (coordinates, table.padding_idx)
                weights_of_axes += [weight @ basis.T, (weight @ mean).unsqueeze(1)]
            else:
                self.others.append(place)
                weights.append(weight)
        self.weight = torch.cat(weights + weights_of_axes, dim=1)

    def forward(self, vectors: Tensor, features: dict[str, Tensor]) -> Tensor:
        """What the layer makes of `vectors`, which are those of `features`: (B, F * D) -> (B, H)."""
        inputs = [vectors.unflatten(1, (len(self.names), -1))[:, self.others].flatten(1)]
        for place, (coordinates, padding) in self.coordinates.items():
            ids = features[self.names[place]].long()
            known = (ids != (-1 if padding is None else padding)).unsqueeze(1).to(coordinates.dtype)
            inputs += [F.embedding(ids, coordinates) * known, known]
        out = F.linear(torch.cat(inputs, dim=1), self.weight, self.bias)
        lookups = []
        for place, (sums, num_rows, padding) in self.sums.items():
            lookups.append(fused.Lookup(sums, features[self.names[place]], num_rows, padding))
        return fused.add_sums(out, lookups)

    @property
    def nbytes(self) -> int:
        """Bytes of what it multiplies and adds up, without what it reads of the tables."""
        words = sum(coded.tensors[0].nbytes for coded, _, _ in self.sums.values())
        return self.weight.nbytes + self.bias.nbytes + words

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.double` and the like call."""
        self.weight, self.bias = fn(self.weight), fn(self.bias)
        for place, (sums, num_rows, padding) in self.sums.items():
            self.sums[place] = (sums._replace(tensors=[fn(tensor) for tensor in sums.tensors]), num_rows, padding)
        self.coordinates = {place: (fn(coordinates), padding) for place, (coordinates, padding) in self.coordinates.items()}
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError(self.unchangeable)


def _sums(table: Table, weight: Tensor) -> fused.Coded | None:
    """What a layer's weight (H, D) makes of a table, as sums of words; None where rows are no words, or so many that nothing is gained."""
    coded = table.coded()
    if coded is None or coded.layout not in ("concat", "sum", "byte_sum"):
        return None
    books, packed_codes, *words = coded.tensors
    if words:
        books = words[0] * books  # whole numbers times their scales
    if _WORD_COST * len(books) >= coded.width:
        return None
    by_book = weight.T.unflatten(0, (len(books), -1)) if coded.layout == "concat" else weight.T
    return fused.sums(packed_codes, (books.detach() @ by_book).contiguous(), coded.numbers[0], len(weight))
