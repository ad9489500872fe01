"""Models made faster for inference: tables read together, and dense layers multiplied with what the tables are made of.

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

from leanrec.bag import TableBag
from leanrec.data.schema import PADDING_ID, Field
from leanrec.embeddings import put
from leanrec.methods import Table
from leanrec.models.dcnv2 import DCNv2
from leanrec.models.deepfm import DeepFM
from leanrec.models.gdcn import GDCNP
from leanrec.models.layers import FieldEmbedding
from leanrec.ops import fused

_WORD_COST = 15  # adding up a value takes as long as about so many products, on a processor with AVX-512: `merged_words` in docs/performance.md

_MODELS = (DeepFM, DCNv2, GDCNP)


def merge(model: nn.Module, *, popular_rows: int = 4096) -> nn.Module:
    """The model for inference alone, in place, faster and with the same answers but for rounding.

    - The tables of a `FieldEmbedding` that the look-up kernel reads are read with one call, each row to where it belongs: nothing is copied
      and the kernel is not called for each field. Lists are averaged while they are read. Of a `VRQ` table, whose popular rows are made of
      the most words, the first `popular_rows` are kept as they are answered, in `popular_rows` x D x 4 bytes of memory.
    - The first dense layer of DeepFM, DCNv2 (not stacked) and GDCN-P is multiplied with the code books and axes of the tables. A layer of H
      outputs that takes the rows of a table of M code books of K words, side by side or summed, is then a sum of M vectors of H numbers
      instead of D x H products; one that takes rows of R coordinates is R x H products. The model takes M x K x H x 4 bytes of memory for
      each field of such words. Fields of other tables, tables that gain nothing (M >= D / 15 or R + 1 >= D), lists and numbers are multiplied
      as before, and so is everything where the layer is not an `nn.Linear`.

    The model can no longer be trained, and no longer be saved or compressed: do that before.

    Args:
        model: With a `leanrec.models.layers.FieldEmbedding`, as all of `leanrec.models` have; DIN reads field by field and gains with lists
            alone. On a GPU, and of other precisions, tables are read one by one and words are added up by torch.
        popular_rows: Rows of each `VRQ` table that are kept; ids from `leanrec prepare` begin with the most popular. 0 keeps none.

    Returns:
        The same model, in evaluation mode, its parameters without gradients. Tables that are read together are not called as modules.

    Raises:
        ValueError: Neither is possible, or `popular_rows` is below 0.
    """
    if popular_rows < 0:
        raise ValueError(f"popular_rows={popular_rows} must be 0 or more.")
    if any(isinstance(module, MergedLinear | MergedEmbedding) for module in model.modules()):
        raise ValueError("the model is merged already.")
    layer = _first_layer(model)
    embeddings = {path: module for path, module in model.named_modules() if type(module) is FieldEmbedding and len(_reads(module)) > 1}
    if layer is None and not embeddings:
        raise ValueError(
            f"{type(model).__name__} has nothing to merge: no tables of a FieldEmbedding that the kernel reads (PQ, MEC, DPQ, RQ, VRQ, Scalar) "
            "and no first dense layer of DeepFM, DCNv2 (not stacked) or GDCNP that takes rows of few words or coordinates (LowRank, SmallDim)."
        )
    if layer is not None:
        put(model, {"deep": MergedMLP(layer, nn.Sequential(*list(model.get_submodule("deep").children())[1:]))})
    model = put(model, {path: MergedEmbedding(embedding, popular_rows) for path, embedding in embeddings.items()})
    return model.eval().requires_grad_(False)


def _first_layer(model: nn.Module) -> MergedLinear | None:
    """The first dense layer of a model, merged, where it is one of vectors of fields alone and gains from it."""
    if not isinstance(model, _MODELS) or type(model) not in _MODELS:  # a class derived from them may have a forward of its own
        return None
    layer = next(model.deep.children(), None)
    if type(layer) is not nn.Linear or (isinstance(model, DCNv2) and model.structure == "stacked"):
        return None
    merged = MergedLinear(layer, model.embedding)
    return merged if merged.sums.tables or merged.coordinates else None


def _reads(embedding: FieldEmbedding) -> dict[int, fused.Read]:
    """Place of a field -> its table, where it is one of which the kernel reads one row."""
    reads = {}
    for place, field in enumerate(embedding.fields):
        table = embedding.table(field) if field.kind == "categorical" else None
        if isinstance(table, Table) and (coded := table.coded()) is not None:
            reads[place] = fused.Read(coded, table.num_embeddings, table.padding_idx)
    return reads


class _Frozen(nn.Module):
    """What holds copies of a model's weights, which neither leave it nor change."""

    unchangeable = "a merged model is for inference alone: load, save, compress and report a model before leanrec.merge."

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError(self.unchangeable)

    def _load_from_state_dict(self, *_: Any) -> None:
        raise ValueError(self.unchangeable)


class MergedEmbedding(_Frozen, FieldEmbedding):
    """A field layer whose tables are read with one call of the kernel."""

    def __init__(self, embedding: FieldEmbedding, popular_rows: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(embedding.__dict__)
        self.popular_rows = popular_rows
        self._gather()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Vectors of all fields: (B, F, D)."""
        ids = [features[name] for name in self._names]
        if not self._together.takes(ids):
            return super().forward(features)
        others = {place: self.embed(field, features[field.name]) for place, field in self._others.items()}
        if any(vectors.dtype != torch.float32 for vectors in others.values()):
            return super().forward(features)
        out = torch.empty((len(ids[0]), len(self.fields), self._together.width), dtype=torch.float32, device="cpu")
        for place, vectors in others.items():
            out[:, place] = vectors
        self._together.read(ids, out)
        return out

    def embed(self, field: Field, values: Tensor) -> Tensor:
        """Vectors of one field: (B, D). The kernel averages lists while it reads them."""
        bag = self._bags.get(field.name)
        return super().embed(field, values) if bag is None or values.dtype not in fused.IDS else bag(values)

    @property
    def nbytes(self) -> int:
        """Bytes of the popular rows that are kept."""
        return sum(rows.nbytes for rows in {read.decoded for read in self._together.tables.values()} if rows is not None)

    def _gather(self) -> None:
        """Find what can be read together."""
        ids = torch.empty(0, dtype=torch.int64, device="cpu")
        reads = {place: read for place, read in _reads(self).items() if fused.takes(read.coded, ids)}
        popular: dict[nn.Module, Tensor] = {}
        for place, read in reads.items():
            if read.coded.layout == "levels":  # rows of the others are read as fast as they are copied
                table = self.table(self.fields[place])
                if table not in popular:
                    popular[table] = table(torch.arange(min(self.popular_rows, read.num_rows), device="cpu")).detach()
                reads[place] = read._replace(decoded=popular[table])
        self._together = fused.SideBySide(reads, len(self.fields))
        self._names = [self.fields[place].name for place in reads]
        self._others = {place: field for place, field in enumerate(self.fields) if place not in reads}
        lists = {field.name: self.table(field) for field in self.fields if field.is_list}
        self._bags = {name: TableBag(table, padding_idx=PADDING_ID) for name, table in lists.items() if isinstance(table, Table)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.double` and the like call."""
        super()._apply(fn, recurse)
        self._gather()
        return self


class MergedMLP(nn.Module):
    """A perceptron whose first layer is merged."""

    def __init__(self, first: MergedLinear, rest: nn.Sequential) -> None:
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, input: Tensor, features: dict[str, Tensor]) -> Tensor:
        """What the perceptron makes of the vectors of `features`: (B, F * D) -> (B, output_dim)."""
        return self.rest(self.first(input, features))


class MergedLinear(_Frozen):
    """A linear layer over the vectors of fields that knows what becomes of the words and axes of their tables.

    Attributes:
        sums: The tables of some fields as sums of words, each of which is (H,), what the layer makes of a word.
        coordinates: Place of a field -> (V, R), padding.
        others: Places of the other fields.
        weight: (H, N), of the vectors of `others`, then of each `coordinates` and a one.
        bias: (H,).
    """

    def __init__(self, layer: nn.Linear, embedding: FieldEmbedding) -> None:
        super().__init__()
        self.names = [field.name for field in embedding.fields]
        sums: dict[int, fused.Read] = {}
        self.coordinates: dict[int, tuple[Tensor, int | None]] = {}
        self.others: list[int] = []
        zeros = layer.weight.new_zeros(layer.out_features)
        self.bias = zeros if layer.bias is None else layer.bias.detach().clone()
        weights, weights_of_axes = [zeros.new_empty(layer.out_features, 0)], []
        for place, (field, weight) in enumerate(zip(embedding.fields, layer.weight.detach().chunk(len(embedding.fields), dim=1), strict=True)):
            table = embedding.table(field) if field.kind == "categorical" else None
            if isinstance(table, Table) and (coded := _sums(table, weight)) is not None:
                sums[place] = fused.Read(coded, table.num_embeddings, table.padding_idx)
            elif isinstance(table, Table) and (axes := table.axes()) is not None:
                coordinates, basis, mean = (values.detach() for values in axes)
                self.coordinates[place] = (coordinates, table.padding_idx)
                weights_of_axes += [weight @ basis.T, (weight @ mean).unsqueeze(1)]
            else:
                self.others.append(place)
                weights.append(weight)
        self.weight = torch.cat(weights + weights_of_axes, dim=1)
        self.sums = fused.Sums(sums, zeros)

    def forward(self, vectors: Tensor, features: dict[str, Tensor]) -> Tensor:
        """What the layer makes of `vectors`, which are those of `features`: (B, F * D) -> (B, H)."""
        inputs = [vectors.unflatten(1, (len(self.names), -1))[:, self.others].flatten(1)]
        for place, (coordinates, padding) in self.coordinates.items():
            ids = features[self.names[place]].long()
            known = (ids != (-1 if padding is None else padding)).unsqueeze(1).to(coordinates.dtype)
            inputs += [F.embedding(ids, coordinates) * known, known]
        out = F.linear(torch.cat(inputs, dim=1), self.weight, self.bias)
        return self.sums.add([features[self.names[place]] for place in self.sums.tables], out)

    @property
    def nbytes(self) -> int:
        """Bytes of what it multiplies and adds up, without what it reads of the tables."""
        return self.weight.nbytes + self.bias.nbytes + self.sums.tiles.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.double` and the like call."""
        self.weight, self.bias = fn(self.weight), fn(self.bias)
        self.sums = self.sums.map(fn)
        self.coordinates = {place: (fn(coordinates), padding) for place, (coordinates, padding) in self.coordinates.items()}
        return self


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
