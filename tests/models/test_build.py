import re
import sys
from inspect import signature
from pathlib import Path

import pytest
from torch import nn

from leanrec.models import MODELS, build

OWN_MODULE = """
from torch import nn

class Popularity(nn.Module):
    def __init__(self, schema, *, item):
        super().__init__()
        self.weight = nn.EmbeddingBag(20, 1, mode="sum")
        self.item = item

    def forward(self, features):
        return self.weight(features[self.item].unsqueeze(1)).squeeze(1)

def popularity(schema, item="item"):
    return Popularity(schema, item=item)

def anything(schema, **settings):
    model = nn.Identity()
    model.settings = settings
    return model

def number(schema):
    return 3

def schemaless():
    return nn.Identity()

def named_only(*, schema):
    return nn.Identity()

def failing(schema):
    return {}["no such key"]

constant = 4
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A user's package `shop_models` with a module `own` and one whose own import fails."""
    package = tmp_path / "shop_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text(OWN_MODULE)
    (package / "broken.py").write_text("import package_nobody_has\n")
    (package / "unfinished.py").write_text("\ndef build(schema: return 1\n")
    (package / "leaving.py").write_text("\nraise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("shop_models", "shop_models.own", "shop_models.broken", "shop_models.unfinished", "shop_models.leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_every_name_builds_its_class(schema):
    for name, model in MODELS.items():
        assert type(build(name, schema)) is model


def test_settings_reach_the_model_as_json_gives_them(schema):
    model = build("dcnv2", schema, embedding_dim=4, hidden_units=[7, 3], num_cross_layers=2)
    assert model.embedding.tables["item"].weight.shape == (20, 4)
    assert [layer.out_features for layer in model.deep if isinstance(layer, nn.Linear)] == [7, 3]
    assert len(model.cross.layers) == 2


def test_unknown_model_lists_the_names(schema):
    with pytest.raises(ValueError, match=r"Model 'deepfn' is unknown. Choose one of \['lr', 'fm', 'deepfm', .*'din'\], or package.module:function"):
        build("deepfn", schema)


def test_unknown_setting_lists_the_valid_ones(schema):
    with pytest.raises(ValueError, match=r"Model 'fm' has no setting 'dropout'. Choose from \['embedding_dim', 'linear', 'embedding_std'\]"):
        build("fm", schema, dropout=0.1)


def test_missing_setting_of_an_own_model_is_named(own_models, schema):
    with pytest.raises(ValueError, match=r"Model 'shop_models.own:Popularity' needs the setting 'item'"):
        build("shop_models.own:Popularity", schema)


@pytest.mark.parametrize(
    ("setting", "values", "right"),
    [
        ("structure", ["serial", None, ["stacked"]], "Choose one of"),
        ("dropout", ["abc", 2.0, 1, -0.1, float("nan"), True, None], "must be a share, a number from 0 to below 1"),
        ("batch_norm", ["yes", 7, 1, None], "must be True or False"),
        ("embedding_std", ["abc", -1, float("nan"), float("inf"), True], "must be a number, 0 or more"),
        ("embedding_dim", [0, 8.5, True, "abc", None, [8]], "must be an integer, 1 or more"),
        ("num_cross_layers", [-1, True], "must be an integer, 1 or more"),
        ("hidden_units", [400, [True]], "must be a list of positive integers"),
    ],
)
def test_a_setting_out_of_range_is_an_error(schema, setting, values, right):
    for value in values:
        for name in (name for name, model in MODELS.items() if name != "lr" and setting in signature(model).parameters):
            with pytest.raises(ValueError, match=f"^{re.escape(f'{setting}={value!r}')} .*{right}"):
                build(name, schema, **{setting: value})


def test_initial_values_may_all_be_zero(schema):
    assert not any(table.weight.any() for table in build("fm", schema, embedding_std=0).embedding.tables.values())


def test_weights_of_logistic_regression_are_single_numbers(schema):
    for embedding_dim in (2, True):
        with pytest.raises(ValueError, match=f"embedding_dim={embedding_dim} must be"):
            build("lr", schema, embedding_dim=embedding_dim)


@pytest.mark.parametrize("setting", ["schema", "name"])
@pytest.mark.parametrize("name", ["deepfm", "shop_models.own:popularity"])
def test_arguments_of_build_are_no_settings(own_models, schema, name, setting):
    with pytest.raises(ValueError, match=f"Model '{name}' has no setting '{setting}'. Choose from"):
        build(name, schema, **{setting: 5})


def test_own_model_is_called_with_schema_and_settings(own_models, schema, features):
    model = build("shop_models.own:popularity", schema, item="user")
    assert type(model).__name__ == "Popularity" and model.item == "user"
    assert build("shop_models.own:popularity", schema)(features).shape == (64,)


def test_own_class_serves_as_a_function(own_models, schema):
    assert build("shop_models.own:Popularity", schema, item="user").item == "user"


def test_own_function_may_take_any_settings(own_models, schema):
    assert build("shop_models.own:anything", schema, depth=3, name="wide").settings == {"depth": 3, "name": "wide"}
    with pytest.raises(ValueError, match="has no setting 'schema'"):
        build("shop_models.own:anything", schema, schema=3)


def test_unknown_setting_of_an_own_model_lists_the_valid_ones(own_models, schema):
    with pytest.raises(ValueError, match=r"has no setting 'items'. Choose from \['item'\]"):
        build("shop_models.own:popularity", schema, items="user")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop_models.other:popularity", "there is no module 'shop_models.other'"),
        ("no_shop.own:popularity", "there is no module 'no_shop'"),
        ("shop_models.own:popular", "module 'shop_models.own' has no function 'popular'"),
        ("shop_models.own:constant", "module 'shop_models.own' has no function 'constant'"),
        ("shop_models.own:", "Write package.module:function"),
        (":popularity", "Write package.module:function"),
        (".own:popularity", "Write package.module:function"),
        ("shop_models.own:number", "returned int, but it must return a torch.nn.Module"),
        ("shop_models.own:schemaless", "must take the schema as its first argument"),
        ("shop_models.own:named_only", "must take the schema as its first argument"),
        ("builtins:dict", "must take the schema as its first argument"),
        ("shop_models.own:failing", r"cannot be made from the schema: KeyError: 'no such key' \(.*own.py, line 31\)"),
        ("json:loads", "cannot be made from the schema: TypeError: the JSON object must be .*, not Schema"),
        ("shop_models.unfinished:build", r"'shop_models.unfinished' cannot be imported: SyntaxError: .* \(unfinished.py, line 2\)"),
        ("shop_models.leaving:build", r"'shop_models.leaving' cannot be imported: SystemExit: 3 \(.*leaving.py, line 2\)"),
    ],
)
def test_own_model_that_cannot_be_made_is_an_error(own_models, schema, name, message):
    with pytest.raises(ValueError, match=f"^Model '{name}'.*{message}"):
        build(name, schema)


def test_a_failing_import_inside_an_own_module_keeps_its_name(own_models, schema):
    with pytest.raises(ModuleNotFoundError, match="package_nobody_has"):
        build("shop_models.broken:popularity", schema)


def test_the_example_of_the_docs_is_a_model(tmp_path, monkeypatch, schema, features):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (tmp_path / "ranking_of_the_docs.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    assert build("ranking_of_the_docs:small", schema, embedding_dim=4)(features).shape == (64,)
