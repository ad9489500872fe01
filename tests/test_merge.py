"""Merged models answer as before: the layers that were multiplied beforehand are compared with those that were not."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import leanrec
from leanrec.data.schema import Field, Schema
from leanrec.merge import MergedEmbedding, MergedLinear
from leanrec.methods import DPQ, MEC, PQ, RQ, VRQ, LowRank, Scalar, SmallDim
from leanrec.models import build
from leanrec.models.deepfm import DeepFM
from leanrec.ops import fused

METHODS = [
    PQ(num_subspaces=2, num_centroids=8),
    PQ(num_subspaces=1, num_centroids=5),  # codes of 3 bits, of which three stand for nothing
    RQ(num_levels=3, num_centroids=16),
    RQ(num_levels=3, num_centroids=16, word_bits=8),
    MEC(num_subspaces=2, num_centroids=8, num_steps=2),
    DPQ(num_subspaces=2, num_centroids=8),
    LowRank(rank=3),
    SmallDim(small_dim=2),
]


def made(method, schema, features, name="deepfm"):
    """A model whose tables are compressed, and what it answers."""
    torch.manual_seed(3)
    model = build(name, schema, embedding_dim=48, hidden_units=[20, 6], embedding_std=0.7).eval()
    leanrec.compress(model, method)
    with torch.no_grad():
        return model, model(features)


def assert_merged(model, features, expected, *, num_merged):
    merged = leanrec.merge(model).deep.first
    assert isinstance(merged, MergedLinear) and len(merged.sums.tables) + len(merged.coordinates) == num_merged
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


@pytest.fixture(params=[2, 5])
def several_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_a_model_of_ids_alone_and_of_32_bits(several_threads):
    """Nothing is left to multiply: what the perceptron takes is a sum of words."""
    schema = Schema(tuple(Field(name, "categorical", "ids", 50) for name in "abc"))  # one table, three shares of the layer
    features = {name: torch.randint(50, (40_000,), generator=torch.Generator().manual_seed(place)) for place, name in enumerate("abc")}
    model, expected = made(PQ(num_subspaces=2, num_centroids=16), schema, features)
    assert_merged(model, {name: ids.int() for name, ids in features.items()}, expected, num_merged=3)
    assert model.deep.first.weight.shape == (20, 0)
    assert model.deep.first.nbytes == 4 * (20 + (3 * 2 * 16 + 1) * 32)  # 16 columns at a time, and a word of zeros


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


@pytest.mark.parametrize("method", [RQ(num_levels=2, num_centroids=8), LowRank(rank=3)], ids=lambda method: method.short())
def test_a_merged_model_of_other_precisions_and_ids(method, schema, features, monkeypatch):
    model, expected = made(method, schema, features)
    leanrec.merge(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(features).float(), expected, rtol=0.1, atol=0.2)
    torch.testing.assert_close(model({**features, "user": features["user"].to(torch.int16)}), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(model).double()(features).float(), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(fused, "_kernel", None)
    monkeypatch.setattr(fused, "_said", True)
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_is_for_inference_alone(schema, features, tmp_path):
    model, _ = made(RQ(num_levels=2, num_centroids=8), schema, features)
    state = copy.deepcopy(model.state_dict())
    leanrec.merge(model.train())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    uses = [
        lambda: leanrec.save(model, tmp_path / "model.safetensors"),
        lambda: model.load_state_dict(state, strict=False),
        lambda: leanrec.compress(model, PQ()),
        lambda: leanrec.compress_dense(model, [features], rank=2),
        lambda: leanrec.report(model),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="load, save, compress and report a model before"):
            use()
    with pytest.raises(ValueError, match="merged already"):
        leanrec.merge(model)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel, by name."""
    names = []

    class Kernel:
        def __getattr__(self, name, kernel=fused._kernel):
            if name in ("Call", "run", "run_side_by_side", "add_sums"):
                names.append(name)
            return getattr(kernel, name)

    monkeypatch.setattr(fused, "_kernel", Kernel())
    monkeypatch.setattr(fused, "bags", lambda *given, bags=fused.bags, **named: names.append("bags") or bags(*given, **named))
    return names


READ_TOGETHER = [*METHODS[:6], PQ(), VRQ(), VRQ(num_levels=8, sorted_rows=False), Scalar(), Scalar(num_bits=4)]


@pytest.mark.parametrize("method", READ_TOGETHER, ids=lambda method: method.short())
def test_tables_are_read_with_one_call(method, schema, features, calls):
    model, _ = made(method, schema, features)
    expected = model.embedding(features)
    leanrec.merge(model).embedding(features)
    calls.clear()
    found = model.embedding(features)
    assert calls == ["bags", "Call", "run", "run_side_by_side"]  # the list, then the three fields of ids, for which all was ready
    torch.testing.assert_close(found, expected)
    assert not (found[:3, 0] != 0).any(), "padding has zeros"
    wide = {name: torch.stack([ids, ids], dim=1)[:, 0] if ids.dim() == 1 else ids for name, ids in features.items()}
    torch.testing.assert_close(model.embedding({**wide, "user": features["user"].int()}), expected)


@pytest.mark.parametrize("popular_rows", [0, 1, 12, 4096])
def test_popular_rows_are_kept_and_the_others_read(popular_rows, schema, features):
    model, _ = made(VRQ(codes_per_1000_rows=6000, num_levels=8), schema, features)
    before = model.embedding(features)
    leanrec.merge(model, popular_rows=popular_rows)
    torch.testing.assert_close(model.embedding(features), before)
    sizes = [min(popular_rows, size) for size in (30, 20)]
    assert model.embedding.nbytes == sum(sizes) * 48 * 4, "a table that two fields share is kept once"
    for table in model.embedding.tables.values():
        table.scales.zero_()
    after = model.embedding(features)
    for place, name in [(0, "user"), (1, "item"), (4, "last")]:
        is_as_before = (after[:, place] == before[:, place]).all(1)
        is_kept = (features[name] < popular_rows) | (features[name] == 0)
        assert torch.equal(is_as_before, is_kept)


def test_a_number_of_popular_rows_below_zero(schema, features):
    with pytest.raises(ValueError, match="popular_rows=-1 must be 0 or more"):
        leanrec.merge(made(VRQ(), schema, features)[0], popular_rows=-1)


@pytest.mark.parametrize("name", ["fm", "ipnn", "dcnv2", "fibinet"])
def test_any_model_with_a_field_layer(name, schema, features):
    methods = {"embedding.tables.user": VRQ(), "embedding.tables.item": Scalar(), "embedding.tables.tag": LowRank(rank=2)}
    torch.manual_seed(3)
    model = build(name, schema, embedding_dim=16, embedding_std=0.7).eval()
    leanrec.compress(model, methods)
    expected = model(features)
    torch.testing.assert_close(leanrec.merge(model)(features), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.embedding, MergedEmbedding)


def test_a_model_that_reads_field_by_field(schema, features, calls):
    schema = Schema((*schema.fields, Field("history", "sequence", "item", 20, max_length=5)))
    features["history"] = torch.randint(20, (64, 5), generator=torch.Generator().manual_seed(8))
    model, expected = made(PQ(), schema, features, "din")
    leanrec.merge(model)
    calls.clear()
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)
    assert calls.count("bags") == 1, "of the tags; the history is weighed by its target"


def test_a_first_order_term_with_tables_of_its_own(schema, features):
    torch.manual_seed(3)
    model = build("fm", schema, embedding_dim=16, embedding_std=0.7, linear="table").eval()
    leanrec.compress(model, Scalar())
    expected = model(features)
    torch.testing.assert_close(leanrec.merge(model)(features), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.first_order.weights, MergedEmbedding)


@pytest.mark.parametrize("method", [VRQ(), Scalar()], ids=lambda method: method.short())
def test_tables_read_together_in_a_copy_of_other_precision_compiled_and_without_the_kernel(method, schema, features, monkeypatch):
    model, expected = made(method, schema, features)
    leanrec.merge(model)
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(features), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), expected, rtol=1e-4, atol=1e-4)
    with fused.plain_torch():
        torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)
    doubles = {name: values.double() if values.is_floating_point() else values for name, values in features.items()}
    torch.testing.assert_close(other.double()(doubles).float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.float()(features), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(features).float(), expected, rtol=0.1, atol=0.2)
    monkeypatch.setattr(fused, "_kernel", None)
    monkeypatch.setattr(fused, "_said", True)
    torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-4)


def test_a_field_layer_of_ones_own_model(schema, features):
    layer = made(VRQ(), schema, features)[0].embedding
    expected = layer(features)
    torch.testing.assert_close(leanrec.merge(layer)(features), expected)


def test_threads_of_a_server_share_a_merged_model(schema, features):
    model, _ = made(VRQ(codes_per_1000_rows=3000, num_levels=8), schema, features)
    expected = leanrec.merge(model)(features)
    parts = [{name: values[start::8] for name, values in features.items()} for start in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            found = list(threads.map(model, parts))
            for start, answers in enumerate(found):
                torch.testing.assert_close(answers, expected[start::8], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_says_so(schema, features):
    wide = leanrec.compress(build("deepfm", schema, embedding_dim=16), LowRank(rank=15))
    for model in [build("fm", schema), build("dcnv2", schema, structure="stacked"), torch.nn.Linear(2, 2), wide]:
        with pytest.raises(ValueError, match=rf"{type(model).__name__} has nothing to merge: no tables of .* and no first dense layer of DeepFM"):
            leanrec.merge(model)


def test_a_dense_layer_that_cannot_be_merged_is_left_alone(schema, features):
    own, _ = made(RQ(num_levels=2), schema, features)
    own.__class__ = type("Own", (DeepFM,), {})  # its forward may be another
    factored = leanrec.compress_dense(made(RQ(num_levels=2), schema, features)[0], [features], rank=2)
    stacked = build("dcnv2", schema, structure="stacked")
    leanrec.compress(stacked, RQ(num_levels=2))
    for model in [own, factored, stacked]:
        expected = model.eval()(features)
        torch.testing.assert_close(leanrec.merge(model)(features), expected, rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, MergedLinear) for module in model.modules())


def test_ids_outside_of_a_table_are_refused(schema, features):
    model, _ = made(RQ(num_levels=2, num_centroids=8), schema, features)
    leanrec.merge(model)
    vectors = model.embedding(features).flatten(1)
    for wrong in (-1, 20):
        ids = {**features, "last": features["last"].index_fill(0, torch.tensor([7]), wrong)}
        with pytest.raises(IndexError, match=f"id {wrong} is outside the table's rows 0 to 19"):
            model.embedding(ids)
        with pytest.raises(IndexError, match=f"id {wrong} is outside the table's rows 0 to 19"):
            model.deep.first(vectors, ids)
    with pytest.raises(ValueError, match=r"3 tables need 64 ids each, but are given \[64, 64, 63\]"):
        model.embedding({**features, "last": features["last"][1:]})
