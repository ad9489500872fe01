import json
import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import leanrec
from leanrec import storage
from leanrec.compress import compress
from leanrec.dense import LowRankLinear, compress_dense
from leanrec.methods import METHODS, PQ
from leanrec.recommender import open_run, predict
from leanrec.report import report
from leanrec.storage import load, save
from leanrec.train import TrainSettings, train_run
from leanrec.tune import TUNING, compress_run


class Model(nn.Module):
    """A table and a perceptron of layers with and without a bias, of which the last has one output."""

    def __init__(self, width=24):
        super().__init__()
        self.user = nn.Embedding(50, 8)
        self.deep = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 20, bias=False), nn.ReLU(), nn.Linear(20, 1))

    def forward(self, users, numbers):
        return self.deep(torch.cat([self.user(users), numbers], dim=-1)).squeeze(-1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def model(**settings):
    torch.manual_seed(0)
    return Model(**settings)


def batches(num_batches=5, seed=1):
    """(users, numbers) of 100 rows each; the numbers spread along few directions, around a mean."""
    draws = seeded(seed)
    mix = torch.randn(8, 8, generator=seeded(2)) * 0.5 ** torch.arange(8).unsqueeze(1)
    return [
        (torch.randint(50, (100,), generator=draws), torch.randn(100, 8, generator=draws) @ mix + torch.arange(8.0) / 4) for _ in range(num_batches)
    ]


def layer_and_rows(*, bias=True):
    torch.manual_seed(3)
    return nn.Linear(12, 10, bias=bias), (torch.randn(400, 12, generator=seeded(4)) @ torch.randn(12, 12, generator=seeded(5)) + 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_factored_layer_is_numpys_principal_components_of_its_outputs(rank, bias):
    layer, rows = layer_and_rows(bias=bias)
    outputs = layer(rows).detach().double().numpy()
    made = compress_dense(layer, rows.split(77), rank=rank)
    mean = outputs.mean(0)
    left, singular, right = np.linalg.svd(outputs - mean, full_matrices=False)
    expected = left[:, :rank] * singular[:rank] @ right[:rank] + mean  # Eckart and Young: no affine function of rank r is nearer
    np.testing.assert_allclose(made(rows).detach().numpy(), expected, atol=2e-5)


def test_a_factored_layer_is_the_formula_of_the_paper_on_rows_it_has_not_seen():
    layer, rows = layer_and_rows()
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    made = compress_dense(layer, [rows], rank=4)
    outputs = rows.double().numpy() @ weight.T + bias
    axes = np.linalg.eigh(np.cov(outputs.T, ddof=0))[1][:, -4:]
    others = torch.randn(30, 12, generator=seeded(6)) * 5
    projection = axes @ axes.T
    expected = (others.double().numpy() @ weight.T + bias) @ projection + (np.eye(10) - projection) @ outputs.mean(0)
    np.testing.assert_allclose(made(others).detach().numpy(), expected, atol=1e-4)


def test_outputs_of_full_rank_come_out_exactly():
    layer, _ = layer_and_rows()
    rows = torch.randn(200, 5, generator=seeded(7)) @ torch.randn(5, 12, generator=seeded(8)) + 1000  # five directions, far from zero
    before = layer(rows).detach()
    torch.testing.assert_close(compress_dense(layer, [rows], rank=5)(rows), before, rtol=1e-6, atol=1e-3)


def test_a_layer_becomes_two_linear_layers_that_any_tool_understands():
    network = compress_dense(model(), batches(), rank=4)
    first, second = network.deep[0]
    assert isinstance(network.deep[0], nn.Sequential) and type(first) is type(second) is nn.Linear
    assert (first.in_features, first.out_features, first.bias) == (16, 4, None)
    assert (second.in_features, second.out_features) == (4, 24)
    exported = torch.export.export(network.eval(), batches()[0]).module()
    torch.testing.assert_close(exported(*batches()[0]), network(*batches()[0]))


def test_every_layer_is_fitted_to_the_outputs_of_the_model_as_it_was():
    """What the third layer is given comes from the layers before they are factored, in evaluation mode, over all batches."""
    network, given = model().eval(), []
    hook = network.deep[3].register_forward_hook(lambda layer, inputs, output: given.append(output.detach()))
    for batch in batches():
        network(*batch)
    hook.remove()
    outputs = torch.cat(given).double()
    axes = torch.linalg.svd(outputs - outputs.mean(0), full_matrices=False).Vh[:4]
    made = compress_dense(model(), batches(), rank=4).deep[3]
    found = made[1].weight.detach().double()
    torch.testing.assert_close(found @ found.T, axes.T @ axes, rtol=1e-4, atol=1e-5)


def test_layers_that_would_not_become_smaller_are_left_alone():
    network = compress_dense(model(), batches(), rank=9)
    # 24 x 16 + 24 numbers > 9 x (24 + 16) + 24; 20 x 24 > 9 x (20 + 24) + 20; one output has nothing to factor
    assert [type(layer) for layer in network.deep if not isinstance(layer, nn.ReLU | nn.Dropout)] == [LowRankLinear, LowRankLinear, nn.Linear]
    network = compress_dense(model(), batches(), rank=10)
    assert type(network.deep[0]) is nn.Linear and isinstance(network.deep[3], LowRankLinear)


def test_layers_are_chosen_by_globs():
    network = compress_dense(model(), batches(), rank=2, layers="deep.3")
    assert type(network.deep[0]) is nn.Linear and isinstance(network.deep[3], LowRankLinear)
    network = compress_dense(model(), batches(), rank=2, layers=["*.0", "*.3"])
    assert isinstance(network.deep[0], LowRankLinear) and isinstance(network.deep[3], LowRankLinear)


def dense_nbytes(network):
    return sum(parameter.nbytes for parameter in network.deep.parameters())


@pytest.mark.parametrize("ratio", [1.5, 3, 6])
def test_a_ratio_is_met_and_used_up(ratio):
    full = dense_nbytes(model())
    network = compress_dense(model(), batches(), ratio=ratio)
    assert full / ratio - 44 * 4 < dense_nbytes(network) <= full / ratio  # one more rank of the larger layer would not fit


def test_ranks_go_where_the_variance_is():
    """Two layers of one size, one of which puts out two directions only: the other gets the ranks."""
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    torch.manual_seed(0)
    with torch.no_grad():
        network[0].weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        network[1].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16))
    rows = torch.randn(500, 16, generator=seeded(9))
    compress_dense(network, [rows], ratio=2)
    assert (network[0].rank, network[1].rank) == (5, 2)  # of 272 numbers, 80 for two directions and 176 for five more


def test_a_layer_with_no_rank_worth_its_bytes_stays_as_it_is():
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    torch.manual_seed(0)
    with torch.no_grad():
        network[0].weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        network[1].weight.copy_(torch.randn(16, 1) @ torch.randn(1, 16))
    compress_dense(network, [torch.randn(500, 16, generator=seeded(9))], ratio=1.6)
    assert type(network[0]) is nn.Linear and network[1].rank == 1


def test_modes_dtype_gradients_and_global_random_state_stay_as_they_were():
    network = model().double()
    network.deep[2].eval()
    network.deep[3].eval()
    network.deep[3].requires_grad_(False)
    state = torch.get_rng_state()
    compress_dense(network, [(users, numbers.double()) for users, numbers in batches()], rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.deep[0].training and network.deep[0][0].training and not network.deep[2].training
    assert not network.deep[3].training and not network.deep[3][0].training
    assert network.deep[0][1].weight.dtype == torch.float64
    assert all(parameter.requires_grad for parameter in network.deep[0].parameters())
    assert not any(parameter.requires_grad for parameter in network.deep[3].parameters())
    assert not network.deep[0]._forward_hooks


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_weight_and_a_frozen_bias_stay_frozen_each_by_itself(tmp_path, frozen):
    layer, rows = layer_and_rows()
    layer.get_parameter(frozen).requires_grad_(False)
    made = compress_dense(layer, [rows], rank=3)
    save(made, tmp_path / "m")
    plain, factored = layer_and_rows()[0], compress_dense(layer_and_rows()[0], [rows], rank=3)
    plain.get_parameter(frozen).requires_grad_(False)
    for name, parameter in factored.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for found in (made, load(plain, tmp_path / "m"), load(factored, tmp_path / "m")):
        assert {name: parameter.requires_grad for name, parameter in found.named_parameters()} == {
            "0.weight": frozen != "weight",
            "1.weight": frozen != "weight",
            "1.bias": frozen != "bias",
        }


def test_layers_over_sequences_count_every_position():
    layer, rows = layer_and_rows()
    flat, nested = compress_dense(nn.Sequential(layer), [rows], rank=3), compress_dense(nn.Sequential(layer), [rows.view(20, 20, 12)], rank=3)
    torch.testing.assert_close(nested(rows), flat(rows))


def test_a_factored_layer_stays_when_others_are_factored():
    network = compress_dense(model(), batches(), rank=2, layers="deep.0")
    first = network.deep[0]
    inner = list(first)
    compress_dense(network, batches(), rank=1)
    assert network.deep[0] is first and list(first) == inner and network.deep[3].rank == 1


@pytest.mark.parametrize("method", METHODS)
def test_layers_inside_of_a_compressed_table_are_the_tables_own(method):
    network = compress(model(), METHODS[method]())
    inside = list(network.user.modules())
    compress_dense(network, batches(), rank=1)
    assert list(network.user.modules()) == inside


def test_report_counts_factored_layers_and_what_they_replaced():
    network = compress_dense(compress(model(), PQ(num_subspaces=2, num_centroids=8)), batches(), rank=4)
    size, full = report(network), report(model())
    assert size.dense == 4 * (4 * (16 + 24) + 24) + 4 * (4 * (24 + 20) + 20)
    assert size.dense_full == 4 * (17 * 24) + 4 * (24 * 20)
    assert size.model == sum(tensor.nbytes for tensor in network.state_dict().values())
    assert size.model_full == full.model
    assert str(size).splitlines()[-2].split()[:4] == ["factored", "layers", f"{size.dense:,}", f"{size.dense_full:,}"]
    assert "factored" not in str(full) and full.dense == full.dense_full == 0


def meta_model():
    with torch.device("meta"):
        return Model()


@pytest.mark.parametrize("build", [Model, meta_model, lambda: compress_dense(model(), batches(), rank=2)])
def test_a_saved_model_comes_back_with_its_factored_layers(tmp_path, build):
    network = compress_dense(compress(model(), PQ(num_subspaces=2, num_centroids=8)), batches(), rank=4).eval()
    save(network, tmp_path / "m")
    given = build()
    state = torch.get_rng_state()
    loaded = load(given, tmp_path / "m").eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(*batches()[0]), network(*batches()[0]))
    assert report(loaded) == report(network)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_a_linear_layer_itself_and_bfloat16_come_back(tmp_path):
    layer, rows = layer_and_rows()
    made = compress_dense(layer.bfloat16(), [rows.bfloat16()], rank=3)
    save(made, tmp_path / "m")
    loaded = load(nn.Linear(12, 10).bfloat16(), tmp_path / "m")
    assert loaded[0].weight.dtype == torch.bfloat16 and torch.equal(loaded(rows.bfloat16()), made(rows.bfloat16()))


def test_the_header_holds_the_ranks(tmp_path):
    save(compress_dense(model(), batches(), rank=4), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    assert json.loads(header["dense"]) == {"deep.0": 4, "deep.3": 4}


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({"deep.9": 4}, "it holds the layer 'deep.9' factored to rank 4, but"),
        ({"user": 4}, "it holds the layer 'user' factored to rank 4, but"),
        ({"deep.0": 0}, "factored to rank 0"),
        ({"deep.0": 17}, "factored to rank 17"),
        ({"deep.0": "4"}, "factored to rank '4'"),
        ({"deep.0": True}, "factored to rank True"),
        ({"deep.0": 5}, "it does not fit the model: 'deep.0.0.weight' is (4, 16)"),
        (["deep.0"], "malformed"),
        ({}, "it does not fit the model: of the model's tensors it lacks"),
    ],
)
def test_a_header_that_lies_about_ranks_is_refused(tmp_path, monkeypatch, ranks, reason):
    dumps = json.dumps
    monkeypatch.setattr(storage.json, "dumps", lambda value: dumps(ranks if value == {"deep.0": 4} else value))
    save(compress_dense(model(), batches(), rank=4, layers="deep.0"), tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(ValueError) as error:
        load(Model(), tmp_path / "m")
    assert str(error.value).startswith(f"{tmp_path / 'm'}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_a_file_from_before_there_were_factored_layers_loads(tmp_path, monkeypatch):
    write = storage.save_file

    def older(tensors, path, header):
        header = {key: text for key, text in header.items() if key not in ("dense", "checksum")}
        write(tensors, path, header | {"checksum": storage._checksum(tensors, header)})

    monkeypatch.setattr(storage, "save_file", older)
    save(model(), tmp_path / "m")
    assert torch.equal(load(Model(), tmp_path / "m").deep[0].weight, model().deep[0].weight)


def tied():
    network = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    network["second"].weight = network["first"].weight
    return network


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(print),
    "forward pre": lambda layer: layer.register_forward_pre_hook(print),
    "backward": lambda layer: layer.register_full_backward_hook(print),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(print),
    "state dict": lambda layer: layer.register_state_dict_post_hook(lambda *call: None),
    "state dict pre": lambda layer: layer.register_state_dict_pre_hook(print),
    "load pre": lambda layer: layer.register_load_state_dict_pre_hook(print),
    "load post": lambda layer: layer.register_load_state_dict_post_hook(print),
    "weight": lambda layer: layer.weight.register_hook(print),
    "bias after accumulation": lambda layer: layer.bias.register_post_accumulate_grad_hook(print),
}


def hooked(kind):
    network = model()
    HOOKS[kind](network.deep[0])
    return network


def encoder():
    return nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), "head": nn.Linear(32, 32)})


def broken():
    network = model()
    with torch.no_grad():
        network.deep[0].bias[3] = float("nan")
    return network


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (model, {}, "Give one of rank and ratio, not rank=None and ratio=None."),
        (model, {"rank": 2, "ratio": 3}, "Give one of rank and ratio, not rank=2 and ratio=3."),
        (
            model,
            {"rank": 2, "layers": "depe.*"},
            "No layer matches the pattern 'depe.*'. The layers of class nn.Linear are: 'deep.0' (16 -> 24), 'deep.3'",
        ),
        (lambda: nn.Embedding(3, 2), {"rank": 2}, "No layer matches the pattern '*'. The layers of class nn.Linear are: none."),
        (model, {"rank": 2, "layers": []}, "layers=[] names no layer. Give globs on their paths, or leave it out for all."),
        (model, {"rank": 2.0}, "rank=2.0 must be an integer."),
        (model, {"rank": True}, "rank=True must be an integer."),
        (meta_model, {"rank": 2}, "Layer 'deep.0' (16 -> 24): it is on the meta device and holds no values. Load its weights first, or"),
        (encoder, {"rank": 2, "layers": "*.linear2"}, "Layer 'encoder.linear2' (64 -> 32): nn.TransformerEncoderLayer reads its weight"),
        (model, {"rank": 0}, "rank=0 makes no layer smaller. Choose 1 to 10."),
        (model, {"rank": 11}, "rank=11 makes no layer smaller. Choose 1 to 10."),
        (model, {"rank": 1, "layers": "deep.5"}, "No rank makes a layer smaller: 'deep.5' (20 -> 1). Choose wider ones."),
        (
            model,
            {"ratio": 100},
            "ratio=100 cannot be met: the 3 layers have 3636 bytes, and 596 with a rank of 1. Choose more than 1, and at most 6.1.",
        ),
        (model, {"ratio": 1}, "ratio=1 cannot be met"),
        (tied, {"rank": 2}, "Layer 'first' (16 -> 16): its weight is also the parameter 'second.weight'. Untie them, or leave the layer out"),
        *((partial(hooked, kind), {"rank": 2}, "Layer 'deep.0' (16 -> 24): it has hooks") for kind in HOOKS),
        (broken, {"rank": 2}, "Layer 'deep.0' (16 -> 24): it puts out values on the batches that are not finite."),
    ],
)
def test_mistakes_are_errors_of_one_line_and_leave_the_model_as_it_was(build, settings, message):
    network = build()
    before = dict(network.named_modules())
    with pytest.raises(ValueError) as error:
        compress_dense(network, batches(), **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert dict(network.named_modules()) == before


def test_a_layer_that_the_batches_do_not_reach_is_an_error():
    network = model()
    network.spare = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"Layer 'spare' \(8 -> 8\): it was given no rows"):
        compress_dense(network, batches(), rank=2)
    with pytest.raises(ValueError, match=r"Layer 'deep.0' \(16 -> 24\): it was given no rows"):
        compress_dense(model(), [], rank=2)
    compress_dense(network, batches(), rank=2, layers="deep.*")


def test_the_output_layer_of_attention_which_is_never_called_is_no_candidate():
    network = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"The layers of class nn\.Linear are: none"):
        compress_dense(network, [], rank=2)


def test_a_transformer_encoder_whose_weights_torch_reads_itself_still_answers():
    network, rows = encoder().eval(), torch.randn(4, 10, 32, generator=seeded(1))
    network.forward = lambda rows: network["head"](network["encoder"](rows))
    before = network["encoder"](rows)
    compress_dense(network, [rows], rank=4)
    with torch.no_grad():
        torch.testing.assert_close(network["encoder"](rows), before, rtol=1e-4, atol=1e-5)  # torch's one kernel against its parts
    assert isinstance(network["head"], LowRankLinear)


@pytest.fixture(scope="module")
def base(small_log, tmp_path_factory):
    """A trained run on the small log."""
    out = tmp_path_factory.mktemp("runs") / "base"
    settings = TrainSettings(epochs=3, batch_size=256, learning_rate=3e-3, table_learning_rate=3e-2)
    train_run(small_log, out, model="deepfm", model_settings={"embedding_dim": 8, "hidden_units": [32, 16]}, settings=settings)
    return out


def test_a_run_is_compressed_with_its_layers_and_opens_again(base, tmp_path):
    tuning = replace(TUNING, epochs=1, batch_size=500, evaluations_per_epoch=2)
    record = compress_run(base, tmp_path / "small", method="Scalar()", dense_ratio=2.5, tuning=tuning)
    full = report(open_run(base).model)
    assert set(record["ranks"]) == {"deep.0", "deep.2"}
    assert record["report"]["dense"] < record["report"]["dense_full"] / 2.5
    assert record["report"]["model_full"] == full.model_full
    small = open_run(tmp_path / "small")
    assert {path: small.model.get_submodule(path).rank for path in record["ranks"]} == record["ranks"]
    assert record["valid"]["auc"] in [entry["auc"] for entry in record["tuning"]["history"] if entry["step"] == record["tuning"]["kept"]]
    again = compress_run(tmp_path / "small", tmp_path / "again", method={"*": None}, tuning=None)
    assert again["ranks"] == record["ranks"]


def test_a_run_killed_after_factoring_goes_on_from_its_factored_layers(base, tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        raise Killed

    settings = {"method": "Scalar()", "dense_ratio": 2.5, "tuning": replace(TUNING, epochs=1, batch_size=500)}
    with pytest.raises(Killed):
        compress_run(base, tmp_path / "small", **settings, on_step=kill)
    record, undisturbed = (compress_run(base, tmp_path / name, **settings) for name in ("small", "undisturbed"))
    assert record["tuning"] == undisturbed["tuning"] and record["ranks"] == undisturbed["ranks"]


def test_layers_factored_to_the_outputs_lose_less_than_to_the_weights(base):
    """The paper's reason to look at outputs: at one rank they keep the model's predictions better than the SVD of the weight does."""
    from leanrec.data.loader import Loader

    def logits(network):
        return predict(network, Loader(full.data, "valid", full.schema, batch_size=500))[1]

    full, by_output, by_weight = open_run(base), open_run(base), open_run(base)
    rows = [batch.features for batch in Loader(full.data, "train", full.schema, batch_size=500).batches()]
    compress_dense(by_output.model, rows, rank=4, layers="deep.0")
    with torch.no_grad():
        weight = by_weight.model.deep[0].weight
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(left[:, :4] * singular[:4] @ right[:4])
    before = logits(full.model)
    assert float((logits(by_output.model) - before).var()) < 0.7 * float((logits(by_weight.model) - before).var())


def test_the_verb_is_public():
    assert leanrec.compress_dense is compress_dense
