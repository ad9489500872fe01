"""Merged models answer as before: the layers that were multiplied beforehand are compared with those that were not."""

import copy

import pytest
import torch

import leanrec
from leanrec.data.schema import Field, Schema
from leanrec.merge import MergedLinear
from leanrec.methods import DPQ, MEC, PQ, RQ, VRQ, LowRank, Scalar, SmallDim
from leanrec.models import build
from leanrec.ops import fused

METHODS = [
    PQ(num_subspaces=2, num_centroids=8),
    PQ(num_subspaces=1, num_centroids=5),  # codes of 3 bits, of which three stand for nothing
    RQ(num_levels=3, num_centroids=16),
    MEC(num_subspaces=2, num_centroids=8, num_steps=2),
    DPQ(num_subspaces=2, num_centroids=8),
    LowRank(rank=3),
    SmallDim(small_dim=2),
]


def made(method, schema, features, name="deepfm", **settings):
    """A model whose tables are compressed, and what it answers."""
    torch.manual_seed(3)
    model = build(name, schema, embedding_dim=16, hidden_units=[12, 6], embedding_std=0.7, **settings).eval()
    leanrec.compress(model, method)
    with torch.no_grad():
        return model, model(features)


def assert_merged(model, features, expected, *, num_merged):
    merged = leanrec.merge(model).deep.first
    assert isinstance(merged, MergedLinear) and len(merged.sums) + len(merged.coordinates) == num_merged
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)
    with fused.plain_torch():
        torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def schema():
    """Three fields of ids, two of which share a table, and a list and a number, which are not merged."""
    ids = [Field("user", "categorical", "user", 30), Field("item", "categorical", "item", 20), Field("last", "categorical", "item", 20)]
    return Schema((*ids[:2], Field("tags", "multivalued", "tag", 9, max_length=4), Field("price", "numeric"), ids[2]))


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(7)
    ids = {name: torch.randint(size, (64,), generator=generator) for name, size in [("user", 30), ("item", 20), ("last", 20)]}
    ids["user"][:3] = 0  # padding has zeros, whatever its codes say
    return {**ids, "tags": torch.randint(9, (64, 4), generator=generator), "price": torch.randn(64, generator=generator)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.short())
def test_a_merged_model_answers_as_before(method, schema, features):
    model, expected = made(method, schema, features)
    assert_merged(model, features, expected, num_merged=3)


@pytest.mark.parametrize("name", ["dcnv2", "gdcnp"])
def test_the_perceptron_beside_crosses_is_merged(name, schema, features):
    model, expected = made(RQ(num_levels=2, num_centroids=8), schema, features, name)
    assert_merged(model, features, expected, num_merged=3)


def test_tables_of_several_methods(schema, features):
    methods = {"embedding.tables.user": PQ(num_subspaces=2, num_centroids=8), "embedding.tables.item": LowRank(rank=2)}
    model, expected = made(methods, schema, features)
    assert_merged(model, features, expected, num_merged=3)


def test_a_model_of_ids_alone_and_of_32_bits():
    """Nothing is left to multiply: what the perceptron takes is a sum of words."""
    schema = Schema(tuple(Field(name, "categorical", "ids", 50) for name in "abc"))  # one table, three shares of the layer
    features = {name: torch.randint(50, (4000,), generator=torch.Generator().manual_seed(place)) for place, name in enumerate("abc")}
    model, expected = made(PQ(num_subspaces=2, num_centroids=16), schema, features)
    assert_merged(model, {name: ids.int() for name, ids in features.items()}, expected, num_merged=3)
    assert model.deep.first.weight.shape == (12, 0)
    assert model.deep.first.nbytes == 4 * (12 + 3 * 2 * 16 * 12)


def test_only_tables_that_gain_are_merged(schema, features):
    methods = {"embedding.tables.user": PQ(num_subspaces=2, num_centroids=8), "*": PQ(num_subspaces=16, num_centroids=8)}
    model, expected = made(methods, schema, features)
    assert_merged(model, features, expected, num_merged=1)


def test_a_merged_model_can_be_copied_and_compiled(schema, features):
    model, expected = made(RQ(num_levels=2, num_centroids=8), schema, features)
    model = copy.deepcopy(leanrec.merge(model))
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_is_for_look_ups_alone(schema, features):
    model, _ = made(RQ(num_levels=2, num_centroids=8), schema, features)
    leanrec.merge(model.train())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="save, compress and report a model before"):
        model.state_dict()


def test_models_that_have_nothing_to_merge_say_so(schema, features):
    with pytest.raises(ValueError, match=r"FM has no dense layer of the vectors of fields alone. DeepFM, DCNv2"):
        leanrec.merge(build("fm", schema))
    with pytest.raises(ValueError, match="DCNv2 has no dense layer"):
        leanrec.merge(build("dcnv2", schema, structure="stacked"))
    for method in [VRQ(), Scalar(), PQ(num_subspaces=16, num_centroids=8), LowRank(rank=15)]:
        with pytest.raises(ValueError, match="nothing to merge: no table has rows of a few words"):
            leanrec.merge(made(method, schema, features)[0])
    factored = leanrec.compress_dense(made(RQ(), schema, features)[0], [features], rank=2)
    with pytest.raises(ValueError, match="the first dense layer is a LowRankLinear"):
        leanrec.merge(factored)


def test_ids_outside_of_a_table_are_refused(schema, features):
    model, _ = made(RQ(num_levels=2, num_centroids=8), schema, features)
    layer = leanrec.merge(model).deep.first
    for wrong in (-1, 30):
        vectors = model.embedding(features).flatten(1)
        with pytest.raises(IndexError, match="row 7"):
            layer(vectors, {**features, "user": features["user"].index_fill(0, torch.tensor([7]), wrong)})
