import copy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from leanrec.bag import TableBag
from leanrec.compress import compress, tables
from leanrec.embeddings import reconstruction_error
from leanrec.methods import METHODS, PQ, VRQ, CpRec, Full, Scalar, Table
from leanrec.report import report

SMALL = PQ(num_subspaces=2, num_centroids=8)


class Model(nn.Module):
    """Tables at several depths: user, nested.item, nested.list.0 (a bag), and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(100, 8)
        self.nested = nn.ModuleDict({"item": nn.Embedding(60, 8, padding_idx=0), "list": nn.ModuleList([nn.EmbeddingBag(30, 8, mode="sum")])})
        self.head = nn.Linear(8, 1)

    def forward(self, users, items, bags):
        return self.head(self.user(users) + self.nested["item"](items) + self.nested["list"][0](bags)).squeeze(-1)


def batch():
    draws = torch.Generator().manual_seed(1)
    return tuple(torch.randint(high, shape, generator=draws) for high, shape in ((100, (16,)), (60, (16,)), (30, (16, 3))))


def embedding(num_embeddings=50, embedding_dim=8, **settings):
    return nn.Embedding.from_pretrained(
        torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0)).index_fill(0, torch.tensor([0]), 0),
        freeze=False,
        **settings,
    )


def error_of(model, method, **settings):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as error:
        compress(model, method, **settings)
    assert dict(model.named_modules()) == modules  # all or nothing
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_table_at_every_depth_is_replaced():
    model = Model()
    assert list(tables(model)) == ["user", "nested.item", "nested.list.0"]
    assert compress(model, SMALL) is model
    assert not [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    assert {path: type(module).__name__ for path, module in tables(model).items()} == {
        "user": "PQTable",
        "nested.item": "PQTable",
        "nested.list.0": "TableBag",
    }


def test_uncompressed_tables_answer_as_before():
    model = Model()
    expected = model(*batch())
    torch.testing.assert_close(compress(model, Full())(*batch()), expected)


def test_model_answers_as_with_the_decoded_rows():
    model = Model()
    decoded = copy.deepcopy(model)
    compress(model, SMALL)
    with torch.no_grad():
        for path, module in tables(decoded).items():
            module.weight.copy_(getattr(tables(model)[path], "table", tables(model)[path]).decode())
    torch.testing.assert_close(model(*batch()), decoded(*batch()))


def test_rows_are_fitted_to_the_weights_not_drawn():
    model = Model()
    original = copy.deepcopy(model)
    compress(model, PQ(num_subspaces=8, num_centroids=64))
    for path, module in tables(original).items():
        assert reconstruction_error(module, tables(model)[path]) < 0.1


def test_first_matching_pattern_decides_and_none_leaves_alone():
    model = Model()
    user = model.user
    compress(model, {"user": None, "nested.item": Full(), "*": SMALL})
    assert model.user is user
    assert model.nested["item"].method == Full()
    assert model.nested["list"][0].table.method == SMALL


def test_what_no_pattern_matches_stays():
    model = Model()
    user = model.user
    compress(model, {"nested.*": SMALL})
    assert model.user is user and isinstance(model.nested["item"], Table)


def test_pattern_is_case_sensitive_and_without_a_table_an_error():
    message = error_of(Model(), {"User": SMALL, "*": None})
    assert message == "No table matches the pattern 'User'. The tables are 'user' (100 x 8), 'nested.item' (60 x 8), 'nested.list.0' (30 x 8)."


def test_method_that_does_not_fit_names_table_value_and_choices():
    model = Model()
    model.nested["odd"] = nn.Embedding(20, 6)
    message = error_of(model, PQ(num_subspaces=4))
    assert message.startswith("Table 'nested.odd' (20 x 6): PQ splits a row into num_subspaces=4 equal parts")
    assert "[1, 2, 3, 6]" in message


def test_ids_that_are_not_sorted_by_popularity_are_an_error_that_names_the_table():
    model = Model()
    with pytest.raises(ValueError, match=r"^Table 'nested.item' \(60 x 8\): the counts do not fall with the row number.*Set sorted_rows=False"):
        compress(model, VRQ(), counts={"user": torch.arange(100, 0, -1), "nested.item": torch.arange(60)})
    assert type(model.user) is nn.Embedding  # nothing was touched
    with pytest.raises(ValueError, match=r"^Table 'user' \(100 x 8\): the counts do not fall with the row number"):
        compress(Model(), CpRec(), counts={"user": torch.arange(100)}, fit=False)


@pytest.mark.parametrize("method", ["PQ()", {"user": "PQ()"}, {"user": PQ}])
def test_what_is_no_method_is_an_error(method):
    assert "must be a Method such as PQ()" in error_of(Model(), method)


def test_model_without_tables_is_an_error():
    assert error_of(nn.Linear(2, 2), SMALL).startswith("Linear has no embedding tables")


def test_table_itself_is_returned_compressed():
    table = compress(embedding(), SMALL)
    assert isinstance(table, Table) and table(torch.tensor([[1, 2]])).shape == (1, 2, 8)
    assert isinstance(compress(nn.EmbeddingBag(50, 8), {"": SMALL}), TableBag)


def test_shared_module_stays_shared():
    model = nn.ModuleDict({"user": embedding(), "again": nn.ModuleDict()})
    model["again"]["user"] = model["user"]
    assert list(tables(model)) == ["user"]
    compress(model, SMALL)
    assert model["again"]["user"] is model["user"] and isinstance(model["user"], Table)


def test_modules_with_one_weight_share_one_table():
    model = nn.ModuleDict({"user": embedding(), "friend": embedding(), "friends": nn.EmbeddingBag(50, 8, mode="max", padding_idx=3)})
    model["friend"].weight = model["friends"].weight = model["user"].weight
    assert list(tables(model)) == ["user", "friend", "friends"]
    compress(model, SMALL)
    assert model["user"] is model["friend"] is model["friends"].table
    assert (model["friends"].mode, model["friends"].padding_idx, model["user"].padding_idx) == ("max", 3, None)


def test_modules_with_one_weight_need_one_method():
    model = nn.ModuleDict({"user": embedding(), "friend": embedding()})
    model["friend"].weight = model["user"].weight
    message = error_of(model, {"user": SMALL})
    assert message.startswith("Table 'user' (50 x 8): shares its weight with 'friend'; give both one method")


def test_modules_with_one_weight_need_one_padding():
    model = nn.ModuleDict({"user": embedding(), "friend": embedding(padding_idx=0)})
    model["friend"].weight = model["user"].weight
    assert "padding_idx" in error_of(model, SMALL)


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


def tied():
    model = nn.ModuleDict({"user": embedding(), "lm_head": nn.Linear(8, 50, bias=False)})
    model["lm_head"].weight = model["user"].weight
    return model


def hooked():
    model = embedding()
    model.register_forward_hook(lambda module, args, output: output + 1)
    return model


class Called(nn.Embedding):
    def __call__(self, input):
        return 2 * super().__call__(input)


class WithScale(nn.Embedding):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.scale = nn.Parameter(torch.ones(()))


def listening(register, hook=lambda *given: None):
    """A table with a hook that `register` gives it."""
    model = embedding()
    register(model)(hook)
    return nn.ModuleDict({"user": model})


def tied_in_part():
    model = nn.ModuleDict({"user": embedding(), "lm_head": nn.Linear(8, 40, bias=False)})
    model["lm_head"].weight = nn.Parameter(model["user"].weight.data[10:])
    return model


def unpadded():
    model = embedding(padding_idx=5)
    return model


def with_nan():
    model = embedding()
    model.weight.data[7, 3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.ModuleDict({"user": Scaled(50, 8)}), "it is a Scaled with a forward of its own"),
        (nn.ModuleDict({"user": embedding(max_norm=1.0)}), "max_norm=1.0"),
        (nn.ModuleDict({"user": embedding(scale_grad_by_freq=True)}), "scale_grad_by_freq"),
        (nn.ModuleDict({"user": unpadded()}), "padding row 5 is not zero"),
        (nn.ModuleDict({"user": with_nan()}), "not finite"),
        (nn.ModuleDict({"user": hooked()}), "hooks"),
        (nn.ModuleDict({"user": nn.utils.parametrizations.weight_norm(embedding())}), "parametrizations"),
        (nn.ModuleDict({"user": Called(50, 8)}), "it is a Called with a forward of its own"),
        (nn.ModuleDict({"user": WithScale(50, 8)}), "parameters of its own"),
        (listening(lambda table: table.register_full_backward_pre_hook), "hooks"),
        (listening(lambda table: table.register_full_backward_hook), "hooks"),
        (listening(lambda table: table.register_state_dict_pre_hook), "hooks"),
        (listening(lambda table: table.register_load_state_dict_post_hook), "hooks"),
        (listening(lambda table: table.weight.register_hook), "hooks"),
        (tied(), "its weight is also the parameter 'lm_head.weight'"),
        (tied_in_part(), "its weight is also the parameter 'lm_head.weight'"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(model, reason):
    model["other"] = embedding()
    message = error_of(model, SMALL)
    assert message.startswith("Table 'user' (50 x 8): ") and reason in message and "{'user': None, '*': ...}" in message
    user = model["user"]
    assert compress(model, {"user": None, "*": SMALL})["user"] is user


def test_a_table_that_is_part_of_another_is_refused():
    model = nn.ModuleDict({"user": embedding(), "friend": nn.Embedding(40, 8)})
    model["friend"].weight = nn.Parameter(model["user"].weight.data[10:])
    with pytest.raises(ValueError, match=r"Table 'user' \(50 x 8\): its weight is also the parameter 'friend.weight'"):
        compress(model, SMALL)


def test_hooks_of_a_compressed_table_are_not_lost_either():
    for model in (embedding(), nn.EmbeddingBag(50, 8)):
        table = compress(model, SMALL)
        getattr(table, "table", table).register_forward_hook(lambda *given: None)
        with pytest.raises(ValueError, match="hooks"):
            compress(table, Scalar())


@pytest.mark.parametrize("shape", [(0, 8), (50, 0)])
def test_a_table_without_values_is_refused_before_the_first_is_touched(shape):
    model = nn.ModuleDict({"user": embedding(), "empty": nn.Embedding(*shape)})
    assert error_of(model, SMALL).startswith(f"Table 'empty' ({shape[0]} x {shape[1]}): it holds no values.")
    assert type(model["user"]) is nn.Embedding
    assert str(report(model)) and report(model).to_dict()["rows"][1]["ratio"] == 1.0


def test_modules_that_hold_no_memory_yet_do_not_matter():
    model = nn.ModuleDict({"user": embedding(), "later": nn.LazyLinear(4)})
    assert report(compress(model, SMALL)).tables == SMALL.nbytes(50, 8)


def test_another_default_dtype_of_torch_is_refused():
    model = embedding()
    torch.set_default_dtype(torch.float64)
    try:
        assert "torch's default dtype is torch.float64, and tables are made in float32" in error_of(model, SMALL)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = nn.Embedding(50, 8)
    with pytest.raises(ValueError, match=r"Table '' \(50 x 8\): it is on the meta device"):
        compress(model, SMALL)


def test_bag_whose_padding_row_is_not_zero_keeps_it_out():
    bag = nn.EmbeddingBag(50, 8, padding_idx=5)
    expected = bag(torch.tensor([[5, 1], [2, 3]]))
    torch.testing.assert_close(compress(bag, Full())(torch.tensor([[5, 1], [2, 3]])), expected)


def test_padding_row_stays_zero():
    table = compress(embedding(padding_idx=0), SMALL)
    assert table.padding_idx == 0 and not table(torch.tensor([0])).any() and table(torch.tensor([1])).any()


def test_device_dtype_mode_and_freezing_are_kept():
    model = nn.ModuleDict({"user": embedding().bfloat16().eval(), "item": embedding().requires_grad_(False), "bag": nn.EmbeddingBag(9, 8).eval()})
    compress(model, SMALL)
    assert model["user"](torch.tensor([1])).dtype == torch.bfloat16
    assert [model[name].training for name in model] == [False, True, False]
    assert [any(part.requires_grad for part in model[name].parameters()) for name in model] == [True, False, True]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_what_the_method_foretold(method):
    assert compress(embedding(), METHODS[method]()).nbytes == METHODS[method]().nbytes(50, 8)


def test_same_seed_gives_the_same_tables_in_any_order():
    first, second = (nn.ModuleDict({name: embedding() for name in order}) for order in (["a", "b"], ["b", "a"]))
    compress(first, SMALL, seed=3)
    compress(second, SMALL, seed=3)
    assert all(torch.equal(first[name].decode(), second[name].decode()) for name in ("a", "b"))
    assert not torch.equal(first["a"].decode(), first["b"].decode())  # each path has draws of its own
    other = compress(nn.ModuleDict({"a": embedding()}), SMALL, seed=4)
    assert not torch.equal(first["a"].decode(), other["a"].decode())


def test_global_state_is_left_alone():
    model, state = Model(), torch.get_rng_state()
    compress(model, SMALL)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_counts_weigh_the_rows():
    hot = torch.zeros(50, dtype=torch.int64)
    hot[:4] = 10_000
    method = PQ(num_subspaces=1, num_centroids=5, weight_power=1.0)
    model = compress(nn.ModuleDict({"user": embedding()}), method, counts={"user": hot})
    plain = compress(nn.ModuleDict({"user": embedding()}), method)
    error = [reconstruction_error(embedding(), part["user"], hot) for part in (model, plain)]
    assert error[0] < 0.1 * error[1]


def test_counts_of_one_weight_are_added():
    def shared():
        model = nn.ModuleDict({"user": embedding(), "friend": embedding()})
        model["friend"].weight = model["user"].weight
        return model

    counts = torch.arange(50)
    both = compress(shared(), SMALL, counts={"user": counts, "friend": counts.flip(0)})
    alone = compress(shared(), SMALL, counts={"user": counts + counts.flip(0)})
    assert torch.equal(both["user"].decode(), alone["user"].decode())


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"usr": torch.ones(100, dtype=torch.int64)}, "counts: the model has no table 'usr'. The tables are 'user' (100 x 8), "),
        ({"user": torch.ones(99, dtype=torch.int64)}, "Table 'user' (100 x 8): counts must be 100 integers >= 0, not torch.int64 of shape (99,)."),
        ({"user": torch.ones(100)}, "Table 'user' (100 x 8): counts must be 100 integers >= 0, not torch.float32"),
        ({"user": torch.full((100,), -1)}, "Table 'user' (100 x 8): counts must be 100 integers >= 0"),
        ({"user": torch.ones(100, dtype=torch.complex64)}, "Table 'user' (100 x 8): counts must be 100 integers >= 0"),
        (torch.ones(100), "counts must be a dict of tables' paths to counts, not Tensor."),
    ],
)
def test_counts_that_do_not_fit_are_errors(counts, reason):
    assert error_of(Model(), SMALL, counts=counts).startswith(reason)


def test_counts_may_be_arrays_and_lists():
    counts = torch.arange(50).flip(0)
    decoded = [compress(embedding(), SMALL, counts={"": given}).decode() for given in (counts, counts.numpy(), counts.tolist())]
    assert torch.equal(decoded[0], decoded[1]) and torch.equal(decoded[0], decoded[2])


def test_compressed_table_is_fitted_again_on_its_decoded_rows():
    model = compress(nn.ModuleDict({"user": embedding(padding_idx=0), "bag": nn.EmbeddingBag(50, 8, mode="max")}), SMALL)
    decoded, mode = model["user"].decode(), model["bag"].mode
    compress(model, PQ(num_subspaces=8, num_centroids=64))
    assert model["user"].method.num_subspaces == model["bag"].table.method.num_subspaces == 8
    torch.testing.assert_close(model["user"].decode(), decoded)  # 64 centroids hold 50 rows without loss
    assert (model["user"].padding_idx, model["bag"].mode) == (0, mode)


def test_compressing_twice_by_one_method_changes_nothing():
    model = compress(Model(), SMALL)
    before = dict(model.named_modules())
    compress(model, SMALL)
    assert dict(model.named_modules()) == before


def test_each_weight_is_let_go_before_the_next_table():
    model = Model()
    held = {path: weakref.ref(module.weight) for path, module in tables(model).items()}
    seen = []

    def progress(path, done, total):
        seen.append((path, done, total, [name for name, weight in held.items() if weight() is not None]))

    compress(model, SMALL, progress=progress)
    assert seen == [
        ("user", 1, 3, ["nested.item", "nested.list.0"]),
        ("nested.item", 2, 3, ["nested.list.0"]),
        ("nested.list.0", 3, 3, []),
    ]


def test_fit_error_is_the_share_of_variance_that_is_lost():
    weight = embedding().weight.detach()
    counts = torch.arange(50)
    table = compress(nn.ModuleDict({"user": embedding()}), SMALL, counts={"user": counts})["user"]
    shares = (counts / counts.sum())[:, None]
    mean = (shares * weight).sum(0)
    expected = (shares * (weight - table.decode()) ** 2).sum() / (shares * (weight - mean) ** 2).sum()
    assert table.fit_error == pytest.approx(float(expected), rel=1e-5)


def test_training_reaches_the_compressed_tables():
    model = compress(Model(), SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {path: getattr(module, "table", module).decode() for path, module in tables(model).items()}
    model(*batch()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(getattr(module, "table", module).decode(), before[path]) for path, module in tables(model).items())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of one process is read from Linux's /proc")
def test_extra_memory_does_not_grow_with_the_rows():
    """A copy of the larger table alone would add 49 MiB; what its codes take is half a MiB."""
    script = """
import re, sys
from torch import nn
from leanrec.compress import compress
from leanrec.methods import PQ

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

model = nn.ModuleDict({"user": nn.Embedding(int(sys.argv[1]), 32)})
before = peak()
compress(model, PQ(num_subspaces=2, num_centroids=16))
print(peak() - before)
"""
    runs = [subprocess.run([sys.executable, "-c", script, rows], capture_output=True, text=True, check=True) for rows in ("100000", "500000")]
    small, large = (float(run.stdout) for run in runs)  # MiB
    assert large - small < 25
