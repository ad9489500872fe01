import pytest
import torch
from torch import nn

from leanrec.data.schema import Field, Schema
from leanrec.models.layers import MLP, FieldEmbedding, FirstOrder


def categorical(*names):
    return Schema(tuple(Field(name, "categorical", name, 5) for name in names))


def test_an_id_becomes_its_row_of_the_table(schema, features):
    layer = FieldEmbedding(schema, 8, embedding_std=1.0)
    vectors = layer(features)
    assert vectors.shape == (64, 5, 8)
    for row in range(64):
        assert torch.equal(vectors[row, 0], layer.tables["user"].weight[features["user"][row]])


def test_a_list_becomes_the_mean_of_its_rows_without_padding(schema, features):
    layer = FieldEmbedding(schema, 8, embedding_std=1.0)
    vectors = layer(features)
    for position, name, table in ((2, "tags", layer.tables["tag"]), (3, "history", layer.tables["item"])):
        for row in range(64):
            kept = [table.weight[id] for id in features[name][row] if id != 0]
            expected = sum(kept) / len(kept) if kept else torch.zeros(8)
            torch.testing.assert_close(vectors[row, position], expected)


def test_padding_stays_out_of_the_mean_when_its_row_is_not_zero(schema, features):
    layer = FieldEmbedding(schema, 8, embedding_std=1.0)
    expected = layer(features)[:, 2]
    with torch.no_grad():
        layer.tables["tag"].weight[0] = 100.0
    torch.testing.assert_close(layer(features)[:, 2], expected)


def test_a_number_scales_its_vector_and_a_missing_one_has_its_own(schema, features):
    layer = FieldEmbedding(schema, 8, embedding_std=1.0)
    vectors, price = layer(features)[:, 4], features["price"]
    missing = price.isnan()
    assert missing.any() and not missing.all()
    torch.testing.assert_close(vectors[~missing], price[~missing].outer(layer.numeric["price"].scale))
    torch.testing.assert_close(vectors[missing], layer.numeric["price"].missing.expand(int(missing.sum()), -1))


def test_a_missing_number_leaves_the_gradients_finite(schema, features):
    layer = FieldEmbedding(schema, 8)
    layer(features).square().sum().backward()
    vectors = layer.numeric["price"]
    assert vectors.scale.grad.isfinite().all() and vectors.scale.grad.any()
    assert vectors.missing.grad.isfinite().all() and vectors.missing.grad.any()


def test_fields_of_one_vocabulary_share_one_table(schema, features):
    layer = FieldEmbedding(schema, 8)
    assert list(layer.tables) == ["user", "item", "tag"]
    layer(features)[:, 3].sum().backward()  # only the history
    assert layer.tables["item"].weight.grad is not None
    assert layer.tables["user"].weight.grad.coalesce().values().any().item() is False


def test_gradients_are_sparse_and_spare_the_padding_row(schema, features):
    layer = FieldEmbedding(schema, 8)
    layer(features).sum().backward()
    for table in layer.tables.values():
        assert table.weight.grad.is_sparse
        assert 0 not in table.weight.grad.coalesce().indices()
        assert not table.weight[0].any()


def test_a_table_can_be_replaced_by_any_module_of_ids(schema, features):
    class Ones(nn.Module):
        def forward(self, ids):
            return torch.ones(*ids.shape, 8)

    layer = FieldEmbedding(schema, 8)
    layer.tables["item"] = Ones()
    vectors = layer(features)
    assert (vectors[:, 1] == 1).all()
    torch.testing.assert_close(vectors[:, 3].sum(1), 8.0 * (features["history"] != 0).any(1))


def test_initial_values_have_the_standard_deviation_asked_for():
    torch.manual_seed(0)
    layer = FieldEmbedding(Schema((Field("user", "categorical", "user", 5000),)), 16, embedding_std=0.02)
    assert layer.tables["user"].weight[1:].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", ["user.id", "items", "type", "keys", "training", "forward"])
def test_any_column_name_can_name_a_table(name):
    vectors = FieldEmbedding(categorical(name), 4)({name: torch.tensor([1, 2])})
    assert vectors.shape == (2, 1, 4)


def test_a_field_may_have_the_name_of_another_ones_vocabulary():
    schema = Schema((Field("price", "categorical", "price", 5), Field("cost", "numeric")))
    assert FieldEmbedding(schema, 4)({"price": torch.tensor([1]), "cost": torch.tensor([0.5])}).shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (categorical("a.b", "a_b"), "'a.b' and 'a_b' both become the module name 'a_b'"),
        (Schema(()), "no fields"),
        (Schema((Field("a", "categorical"),)), "Field 'a': kind 'categorical' needs a vocabulary"),
        (Schema((Field("a", "categorical", "v", 5), Field("b", "sequence", "v", 6))), "All fields of one vocabulary need the same number"),
        (Schema((Field("a", "categorical", "v", 0),)), "num_embeddings=0"),
    ],
)
def test_a_schema_that_gives_no_tables_is_an_error(schema, message):
    with pytest.raises(ValueError, match=message):
        FieldEmbedding(schema, 4)


def test_an_embedding_dim_below_one_is_an_error():
    with pytest.raises(ValueError, match="embedding_dim=0 must be an integer, 1 or more"):
        FieldEmbedding(categorical("a"), 0)


def test_projected_weight_of_an_id_is_the_inner_product_with_its_fields_vector(schema, features):
    embedding, first_order = FieldEmbedding(schema, 8, embedding_std=1.0), FirstOrder(schema, 8)
    vectors = embedding(features)
    by_field = first_order.weights.weight.view(5, 8)
    nn.init.constant_(first_order.bias, 0.3)
    expected = [0.3 + sum(by_field[field] @ vectors[row, field] for field in range(5)) for row in range(64)]
    torch.testing.assert_close(first_order(features, vectors), torch.stack(expected))


def test_tabled_weights_are_free_and_leave_the_vectors_alone(schema, features):
    first_order = FirstOrder(schema, 8, linear="table", embedding_std=1.0)
    assert first_order.weights.tables["item"].weight.shape == (20, 1)
    scores = first_order(features, torch.full((64, 5, 8), torch.nan))
    torch.testing.assert_close(scores, first_order.weights(features)[:, :, 0].sum(1))


def test_unknown_kind_of_first_order_is_an_error(schema):
    with pytest.raises(ValueError, match=r"linear='tabel' is unknown. Choose one of \['projection', 'table'\]"):
        FirstOrder(schema, 8, linear="tabel")


def test_a_perceptron_has_batch_norm_before_its_activation_and_dropout_after():
    kinds = [type(module) for module in MLP(4, [3, 2], output_dim=1, dropout=0.5, batch_norm=True)]
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert kinds == [*block, *block, nn.Linear]


@pytest.mark.parametrize("hidden_units", [400, "400", (400, 0), [1.5]])
def test_hidden_units_that_are_no_widths_are_an_error(hidden_units):
    with pytest.raises(ValueError, match="must be a list of positive integers"):
        MLP(4, hidden_units)
