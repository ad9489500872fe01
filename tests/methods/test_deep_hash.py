import numpy as np
import pytest
import torch

from leanrec.methods import DeepHash
from leanrec.ops.hashing import hash_buckets
from leanrec.ops.spread import Spread
from leanrec.train.row_adam import RowAdam


def make_weight(num_embeddings=500, embedding_dim=8):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0)) + 2


def make_counts(num_embeddings=500):
    return torch.randint(1, 500, (num_embeddings,), generator=torch.Generator().manual_seed(1))


def features_by_formula(table):
    """The paper's encoding and hidden layers for all ids: (V, width)."""
    hashes = hash_buckets(torch.arange(table.num_embeddings), table.seeds, 10**6).double().numpy()
    values = hashes / (10**6 - 1) * 2 - 1
    for weight, bias in list(zip(table.weights, table.biases, strict=True))[:-1]:
        values = values @ weight.detach().double().numpy().T + bias.detach().double().numpy()
        values = values * np.tanh(np.log1p(np.exp(values)))  # Mish
    return values


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_row_is_the_output_of_the_network_for_the_hashes_of_its_id(num_layers):
    table = DeepHash(width=10, num_layers=num_layers, num_hashes=6).build(100, 8)
    expected = features_by_formula(table) @ table.weights[-1].detach().double().numpy().T + table.biases[-1].detach().double().numpy()
    np.testing.assert_allclose(table.decode().numpy(), expected, atol=1e-6)


def test_inputs_are_spread_evenly_from_minus_one_to_one():
    seeds = DeepHash(num_hashes=4).build(10, 8).seeds
    values = hash_buckets(torch.arange(5000), seeds, 10**6) / (10**6 - 1) * 2 - 1
    assert abs(float(values.mean())) < 0.02
    assert float(values.square().mean()) == pytest.approx(1 / 3, abs=0.02)
    assert torch.corrcoef(values.T).triu(1).abs().max() < 0.05


@pytest.mark.parametrize("num_steps", [0, 20])
def test_the_last_layer_has_the_least_squared_error(num_steps):
    weight, counts = make_weight(), make_counts()
    table = DeepHash(width=20, num_steps=num_steps).build(500, 8).fit(weight, counts)
    root = counts.double().sqrt().unsqueeze(1).numpy()
    design = np.c_[features_by_formula(table), np.ones(500)]
    solution = np.linalg.lstsq(design * root, weight.double().numpy() * root, rcond=None)[0]
    least = (((design @ solution - weight.numpy()) * root) ** 2).sum()
    assert (((table.decode() - weight).numpy() * root) ** 2).sum() < 1.001 * least


def test_large_tables_are_solved_on_a_sample_that_does_as_well():
    draws = torch.Generator().manual_seed(2)
    weight, counts = torch.randn(20_000, 8, generator=draws), 1_000_000 // torch.arange(1, 20_001)
    sampled = DeepHash(width=16, num_steps=0).build(20_000, 8).fit(weight, counts)  # 256 rows per unit of width are drawn
    design = np.c_[features_by_formula(sampled), np.ones(20_000)]
    root = counts.double().sqrt().unsqueeze(1).numpy()
    solution = np.linalg.lstsq(design * root, weight.double().numpy() * root, rcond=None)[0]
    least = (((design @ solution - weight.numpy()) * root) ** 2).sum()
    assert (((sampled.decode() - weight).numpy() * root) ** 2).sum() < 1.01 * least


def test_steps_lower_the_error():
    weight = make_weight()
    errors = [float((DeepHash(num_steps=steps).build(500, 8).fit(weight).decode() - weight).square().mean()) for steps in (0, 20, 100)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.6 * errors[0]


def test_without_steps_a_fit_loses_what_was_expected():
    weight, counts = make_weight(), 100_000 // torch.arange(1, 501)
    setting, shares = DeepHash(num_steps=0), counts / counts.sum()
    distances = (weight - shares @ weight).square().sum(1)
    found = float(shares @ (setting.build(500, 8).fit(weight, counts).decode() - weight).square().sum(1) / (shares @ distances))
    assert setting.expected_error(Spread.measure([weight], 500, counts)) == pytest.approx(found, rel=0.15)


def test_bytes_are_those_of_the_layers_and_the_hash_seeds():
    setting = DeepHash(width=10, num_layers=3, num_hashes=6)
    assert setting.nbytes(10**9, 8) == (6 * 10 + 10 + 2 * (10 * 10 + 10) + 10 * 8 + 8) * 4 + 6 * 8


def test_knob_values_end_before_the_network_is_larger_than_the_table():
    values = DeepHash().knob_values(1000, 16)
    assert DeepHash(width=values[-1]).nbytes(1000, 16) <= 1000 * 16 * 4
    assert DeepHash().knob_values(1, 8) == [8]


@pytest.mark.parametrize("num_layers", [1, 5])
def test_an_unfitted_table_has_rows_of_the_usual_spread(num_layers):
    assert 0.006 < float(DeepHash(num_layers=num_layers).build(1000, 16).decode().std()) < 0.014


def test_a_fitted_table_carries_no_gradients_over():
    table = DeepHash(num_steps=3).build(500, 8).fit(make_weight())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in table.parameters())


def test_training_from_scratch_learns_rows_that_hashes_alone_do_not_tell():
    weight, draws = make_weight(200), torch.Generator().manual_seed(3)
    table = DeepHash().build(200, 8, generator=draws)
    optimizer = RowAdam(table.parameters(), lr=0.01)
    for _ in range(300):
        ids = torch.randint(200, (128,), generator=draws)
        optimizer.zero_grad()
        (table(ids) - weight[ids]).square().mean().backward()
        optimizer.step()
    assert (table.decode() - weight).square().mean() < 0.2 * weight.var()
    assert table.nbytes == DeepHash().nbytes(200, 8)


@pytest.mark.parametrize("setting", [{"num_layers": 0}, {"num_hashes": 0}, {"batch_size": 0}, {"num_steps": -1}])
def test_settings_out_of_range_are_errors(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DeepHash(**setting).build(1000, 16)
