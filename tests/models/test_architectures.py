"""Each model against its paper's formula, in plain loops over rows, fields and pairs; and what all of them promise."""

import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from leanrec.data.schema import Field, Schema
from leanrec.models import MODELS, build
from leanrec.models.din import Dice

HIDDEN = {name: {"hidden_units": [12, 6]} for name in MODELS if name not in ("lr", "fm")}
ALL_FORMS = [(name, {}) for name in MODELS] + [
    ("fm", {"linear": "table"}),
    ("dcnv2", {"structure": "stacked"}),
    ("fibinet", {"bilinear": "each"}),
    ("fibinet", {"bilinear": "all"}),
    ("din", {"activation": "prelu"}),
    ("deepfm", {"batch_norm": True, "dropout": 0.1}),
]


def lively(name, schema, **settings):
    """A model whose vectors are large enough for every term of its formula to count."""
    torch.manual_seed(3)
    width = {} if name == "lr" else {"embedding_dim": 4}
    return build(name, schema, **width, **HIDDEN.get(name, {}), **settings, embedding_std=0.7)


def perceptron(layers, x, activation=torch.relu):
    """Plain linear layers, an activation after each but a last one without."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linear[:2]:
        x = activation(layer.weight @ x + layer.bias)
    for layer in linear[2:]:
        x = layer.weight @ x + layer.bias
    return x


def pairs_of(vectors):
    return itertools.combinations(vectors, 2)


def assert_rows_follow(model, features, formula):
    """Logits equal `formula(vectors of the row (F, D), first-order term of the row)`, row by row."""
    model.eval()
    with torch.no_grad():
        vectors = model.embedding(features)
        linear = model.first_order(features, vectors) if hasattr(model, "first_order") else torch.zeros(64)
        expected = torch.stack([formula(vectors[row], linear[row]).reshape(()) for row in range(64)])
        torch.testing.assert_close(model(features), expected, rtol=1e-4, atol=1e-5)  # sums of a few hundred float32 products


def test_lr_sums_one_weight_per_value(schema, features):
    model = lively("lr", schema)
    nn.init.constant_(model.bias, 0.2)
    assert_rows_follow(model, features, lambda weights, _: 0.2 + sum(weights))


@pytest.mark.parametrize("linear", ["projection", "table"])
def test_fm_adds_inner_products_of_all_pairs(schema, features, linear):
    model = lively("fm", schema, linear=linear)
    assert_rows_follow(model, features, lambda vectors, first: first + sum(a @ b for a, b in pairs_of(vectors)))


def test_deepfm_adds_a_perceptron_to_fm(schema, features):
    model = lively("deepfm", schema)
    assert_rows_follow(model, features, lambda v, first: first + sum(a @ b for a, b in pairs_of(v)) + perceptron(model.deep, v.flatten()))


def crossed(model, x0):
    x = x0
    for layer in model.cross.layers:
        x = x0 * (layer.weight @ x + layer.bias) + x
    return x


def test_parallel_dcnv2_joins_the_cross_network_and_the_perceptron(schema, features):
    model = lively("dcnv2", schema)

    def formula(vectors, _):
        x0 = vectors.flatten()
        return model.output.weight @ torch.cat([crossed(model, x0), perceptron(model.deep, x0)]) + model.output.bias

    assert_rows_follow(model, features, formula)


def test_stacked_dcnv2_puts_the_perceptron_on_the_cross_network(schema, features):
    model = lively("dcnv2", schema, structure="stacked")
    assert_rows_follow(model, features, lambda v, _: model.output.weight @ perceptron(model.deep, crossed(model, v.flatten())) + model.output.bias)


def test_ipnn_gives_the_perceptron_vectors_and_inner_products(schema, features):
    model = lively("ipnn", schema)

    def formula(vectors, _):
        products = torch.stack([a @ b for a, b in pairs_of(vectors)])
        return perceptron(model.deep, torch.cat([vectors.flatten(), products]))

    assert_rows_follow(model, features, formula)


def test_gdcnp_gates_every_cross(schema, features):
    model = lively("gdcnp", schema)

    def formula(vectors, _):
        c0 = c = vectors.flatten()
        for layer, gate in zip(model.cross.layers, model.cross.gates, strict=True):
            c = c0 * (layer.weight @ c + layer.bias) * torch.sigmoid(gate.weight @ c) + c
        return model.output.weight @ torch.cat([c, perceptron(model.deep, c0)]) + model.output.bias

    assert_rows_follow(model, features, formula)


@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
def test_fibinet_multiplies_pairs_through_a_matrix_before_and_after_reweighting_fields(schema, features, kind):
    model = lively("fibinet", schema, bilinear=kind)
    w1, w2 = model.senet.excite[0].weight, model.senet.excite[2].weight
    pairs = list(itertools.combinations(range(5), 2))
    matrix = {"all": lambda i, j: 0, "each": lambda i, j: i, "interaction": lambda i, j: pairs.index((i, j))}[kind]

    def formula(vectors, first):
        weights = torch.relu(w2 @ torch.relu(w1 @ vectors.mean(1)))
        reweighted = vectors * weights.unsqueeze(1)
        products = [v[i] @ model.bilinear.weight[matrix(i, j)] * v[j] for v in (vectors, reweighted) for i, j in pairs]
        return first + perceptron(model.deep, torch.cat(products))

    assert_rows_follow(model, features, formula)


@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_din_sums_behaviours_by_their_relevance_to_the_target(schema, features, activation):
    model = lively("din", schema, activation=activation, attention_units=[5, 3])
    for module in model.modules():  # as training would leave them
        if isinstance(module, Dice):
            nn.init.uniform_(module.mean), nn.init.uniform_(module.variance, 0.5, 2.0), nn.init.uniform_(module.alpha)

    def run(layers, x):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                x = layer.weight @ x + layer.bias
            elif isinstance(layer, nn.PReLU):
                x = torch.where(x > 0, x, layer.weight * x)
            else:
                p = torch.sigmoid((x - layer.mean) / (layer.variance + 1e-8).sqrt())
                x = p * x + (1 - p) * layer.alpha * x
        return x

    table, unit = model.embedding.tables["item"].weight, model.units[0].relevance
    histories = iter(features["history"])

    def formula(vectors, _):
        target = vectors[1]
        behaviours = [table[id] for id in next(histories) if id != 0]
        interest = sum((run(unit, torch.cat([e, target, e - target, e * target])) * e for e in behaviours), torch.zeros(4))
        return run(model.deep, torch.cat([vectors[0], vectors[1], vectors[2], interest, vectors[4]]))

    assert_rows_follow(model, features, formula)


def test_dice_in_training_bends_at_the_mean_of_the_batch():
    torch.manual_seed(0)
    s, dice = torch.randn(200, 3) * 2 + 5, Dice(3)
    nn.init.constant_(dice.alpha, 0.25)
    p = torch.sigmoid((s - s.mean(0)) / s.var(0, unbiased=False).sqrt())
    torch.testing.assert_close(dice(s), p * s + (1 - p) * 0.25 * s)
    torch.testing.assert_close(dice.mean, 0.1 * s.mean(0))  # the running mean started at zero


@pytest.mark.parametrize("num_behaviours", [0, 1])
def test_din_trains_on_a_batch_with_too_few_behaviours_for_statistics(schema, features, num_behaviours):
    model = lively("din", schema).train()
    statistics = model.units[0].relevance[1].mean.clone()
    history = torch.zeros(64, 6, dtype=torch.int64)
    history[0, :num_behaviours] = 3
    logits = model({**features, "history": history})
    logits.sum().backward()
    assert logits.isfinite().all()
    assert torch.equal(model.units[0].relevance[1].mean, statistics)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_din_under_autocast_answers_as_without_but_for_rounding(schema, features, activation, training):
    model = lively("din", schema, activation=activation).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(features)
    logits.float().sum().backward()
    expected = model(features)
    assert (logits - expected).norm() < 0.05 * expected.norm()  # bfloat16 has 8 bits: some rounding errors of 1 in 256
    assert all(parameter.grad is not None for parameter in model.units.parameters())


def test_din_averages_a_sequence_without_a_target(features, schema):
    pages = Field("pages", "sequence", "page", 20, max_length=6)
    schema = Schema((*schema.fields, pages))
    model = lively("din", schema).eval()
    assert model.targets == {"history": "item"}
    backwards = {**features, "pages": features["history"]}
    shorter = {**features, "pages": features["history"].repeat(1, 2)}
    torch.testing.assert_close(model(backwards), model(shorter))


def test_din_holds_a_sequence_against_the_target_that_was_named(schema, features):
    schema = Schema((*schema.fields, Field("previous", "categorical", "item", 20)))
    features = {**features, "previous": features["item"].flip(0)}
    first, named = (lively("din", schema, targets=targets).eval() for targets in (None, {"history": "previous"}))
    assert (first.targets, named.targets) == ({"history": "item"}, {"history": "previous"})
    assert not torch.allclose(first(features), named(features))


def test_din_without_a_target_says_what_the_schema_needs():
    schema = Schema((Field("item", "categorical", "item", 20), Field("pages", "sequence", "page", 20, max_length=6)))
    with pytest.raises(ValueError, match=r"shares its vocabulary with a categorical field.*\['pages'\]"):
        build("din", schema)


def test_din_refuses_a_target_of_another_vocabulary(schema):
    with pytest.raises(ValueError, match=r"targets=\{'history': 'user'\} does not fit.*\{'history': \['item'\]\}"):
        build("din", schema, targets={"history": "user"})


def test_fibinet_of_one_field_is_an_error():
    with pytest.raises(ValueError, match="two or more"):
        build("fibinet", Schema((Field("item", "categorical", "item", 20),)))


def test_lr_refuses_an_embedding_dim(schema):
    with pytest.raises(ValueError, match="embedding_dim=16 must be 1"):
        build("lr", schema, embedding_dim=16)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_default_settings_give_finite_logits_of_one_per_row(schema, features, name):
    logits = build(name, schema)(features)
    assert logits.shape == (64,) and logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "settings"), ALL_FORMS)
def test_longer_padding_changes_nothing(schema, features, name, settings):
    model = lively(name, schema, **{**settings, **({"dropout": 0.0} if "dropout" in settings else {})}).train()
    padded = {key: nn.functional.pad(value, (0, 5)) if value.dim() == 2 else value for key, value in features.items()}
    torch.testing.assert_close(model(padded), model(features))


@pytest.mark.parametrize(("name", "settings"), ALL_FORMS)
def test_a_row_does_not_depend_on_its_batch(schema, features, name, settings):
    model = lively(name, schema, **settings).eval()
    part = {key: value[10:13] for key, value in features.items()}
    torch.testing.assert_close(model(part), model(features)[10:13], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), ALL_FORMS)
def test_gradients_reach_every_parameter(schema, features, name, settings):
    model = lively(name, schema, **settings)
    labels = (torch.arange(64) % 2).float()
    nn.functional.binary_cross_entropy_with_logits(model(features), labels).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.to_dense().isfinite().all(), path
        assert parameter.grad.to_dense().any(), path


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_saved_state_answers_the_same(schema, features, name):
    model = lively(name, schema).eval()
    other = build(name, schema, **({} if name == "lr" else {"embedding_dim": 4}), **HIDDEN.get(name, {})).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(features), model(features))


def clicks(num_rows, seed):
    """Users and items whose planted affinity, beside the item's own pull, decides the click; the other fields are noise."""
    planted, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tastes, traits = torch.randn(30, 2, generator=planted), torch.randn(20, 2, generator=planted)
    affinity, pull = 2.0 * tastes @ traits.T, torch.randn(20, generator=planted)
    user, item = torch.randint(2, 30, (num_rows,), generator=drawn), torch.randint(2, 20, (num_rows,), generator=drawn)
    logits = affinity[user, item] + pull[item]
    noise = {
        "tags": torch.randint(0, 9, (num_rows, 4), generator=drawn),
        "history": torch.randint(0, 20, (num_rows, 6), generator=drawn),
        "price": torch.randn(num_rows, generator=drawn),
    }
    labels = (torch.rand(num_rows, generator=drawn) < logits.sigmoid()).float()
    return {"user": user, "item": item, **noise}, labels


def train(model, features, labels, num_epochs):
    tables = [parameter for path, parameter in model.named_parameters() if ".tables." in path]
    others = [parameter for path, parameter in model.named_parameters() if ".tables." not in path]
    optimizers = [torch.optim.SparseAdam(tables, lr=0.01), torch.optim.Adam(others, lr=0.01)]
    for epoch in range(num_epochs):
        for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).split(256):
            logits = model({key: value[rows] for key, value in features.items()})
            nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_planted_interactions_are_learned_by_all_models_that_can(schema, name):
    torch.manual_seed(5)
    model = build(name, schema, **({} if name == "lr" else {"embedding_dim": 8}), **({"hidden_units": [32, 16]} if name in HIDDEN else {}))
    train(model, *clicks(6000, seed=1), num_epochs=6)
    features, labels = clicks(4000, seed=2)
    with torch.no_grad():
        auc = roc_auc_score(labels, model.eval()(features))
    # By the planted truth itself the AUC of these rows is 0.90, and 0.65 by the pull of the items alone, which is all that LR can see.
    assert (0.6 < auc < 0.7) if name == "lr" else auc > 0.75
