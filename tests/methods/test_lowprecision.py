import pytest
import torch
import torch.nn.functional as F

from leanrec.methods.lowprecision import LowPrecision
from leanrec.train.row_adam import RowAdam

V, D = 200, 6


def make_weight(num_embeddings=V, embedding_dim=D):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def give_gradients(table, ids, gradients, *, step=0):
    """One step of training in which these rows get these gradients."""
    (table(ids) * gradients).sum().backward()
    assert not list(table.maintain(step))


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_a_fit_takes_the_nearest_levels_of_a_scale_that_no_other_beats_by_much(num_bits):
    weight = make_weight()
    table = LowPrecision(num_bits=num_bits).build(V, D).fit(weight)
    levels = torch.linspace(-1, 1, 2**num_bits)

    def best(scales):
        return (weight.unsqueeze(2) - scales.unsqueeze(2) * levels).square().amin(2).sum(1)

    found = (table.decode() - weight).square().sum(1)
    torch.testing.assert_close(found, best(table.scales.detach()), rtol=1e-3, atol=1e-7)
    finest = torch.stack([best(weight.abs().amax(1, keepdim=True) * share) for share in torch.linspace(0.1, 1, 100)]).amin(0)
    assert found.sum() < 1.2 * finest.sum()


@pytest.mark.parametrize(("num_bits", "embedding_dim", "row"), [(8, 5, 5), (4, 5, 3), (2, 5, 2), (2, 8, 2)])
def test_bytes_are_codes_from_whole_bytes_on_and_a_scale_per_row(num_bits, embedding_dim, row):
    assert LowPrecision(num_bits=num_bits).nbytes(100, embedding_dim) == 100 * (row + 4)


def test_rounding_in_training_is_right_on_average():
    table = LowPrecision(num_bits=4, learning_rate=0.01).build(20_000, D).fit(make_weight(1).expand(20_000, D))
    before, gradient = table.decode()[0], torch.linspace(-1, 2, D)
    table.begin()
    give_gradients(table, torch.arange(20_000), gradient.expand(20_000, D))
    moved = table.eval().decode()
    expected = before - 0.01 * gradient / gradient.square().mean().sqrt()  # the first step of AdaGrad
    inside = before.abs() < 0.9 * float(table.scales.detach().amin())
    step = 2 * float(table.scales.detach().amax()) / 15
    assert (expected - before).abs().max() < 0.2 * step  # rounding to the nearest level would undo it
    torch.testing.assert_close(moved.mean(0)[inside], expected[inside], rtol=0, atol=0.015 * step)  # 4 standard errors of 20,000 draws
    assert inside.sum() > D // 2


def test_gradients_of_an_id_looked_up_twice_add_up():
    tables = [LowPrecision().build(V, D).fit(make_weight()) for _ in range(2)]
    first, second = make_weight(2)
    for table in tables:
        table.begin()
    give_gradients(tables[0], torch.tensor([3]), first + second)
    (tables[1](torch.tensor([3])) * first).sum().backward()
    give_gradients(tables[1], torch.tensor([3, 7]), torch.stack([second, torch.zeros(D)]))
    torch.testing.assert_close(tables[0].eval()(torch.tensor(3)), tables[1].eval()(torch.tensor(3)), rtol=0, atol=0.02)
    torch.testing.assert_close(tables[0].squares, tables[1].squares)


def test_a_step_leaves_other_rows_and_rows_without_a_gradient_alone():
    table = LowPrecision().build(V, D).fit(make_weight())
    before = table.decode()
    table.begin()
    table.padding_idx = 5
    give_gradients(table, torch.tensor([2, 5, 9]), torch.ones(3, D))
    table.padding_idx = None
    assert (table.eval().decode() != before).any(1).nonzero().flatten().tolist() == [2, 9]


def train(table, steps):
    """Clicks whose log odds are the product of a known vector and the row to be learned."""
    targets, rates = make_weight() * 0.5, 1 / (1 + torch.arange(V)) ** 0.5
    optimizer = RowAdam(table.parameters(), lr=0.01)
    for step in steps:
        draws = torch.Generator().manual_seed(step)
        ids = torch.multinomial(rates, 256, replacement=True, generator=draws)
        others = torch.randn(256, D, generator=draws)
        clicks = torch.sigmoid((others * targets[ids]).sum(1)) > torch.rand(256, generator=draws)
        F.binary_cross_entropy_with_logits((others * table(ids)).sum(1), clicks.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        table.maintain(step)
    lost = rates @ (table.eval().decode() - targets).square().sum(1) / (rates @ targets.square().sum(1))
    table.train()
    return float(lost), optimizer


@pytest.mark.parametrize(("num_bits", "most"), [(4, 0.5), (8, 0.4)])
def test_training_from_scratch_learns_rows_far_beyond_the_first_scale_in_few_bits(num_bits, most):
    method = LowPrecision(num_bits=num_bits)
    table = method.build(V, D)
    table.begin()
    lost, optimizer = train(table, range(400))
    assert lost < most
    assert sum(tensor.nbytes for tensor in table.state_dict().values()) == method.nbytes(V, D) + V * 4  # no full-precision copy,
    assert not optimizer.state  # and no moments
    learned = table.eval().decode()
    table.finish()
    assert table.nbytes == method.nbytes(V, D)
    assert torch.equal(table.decode(), learned)
    loaded = method.build(V, D)
    loaded.load_state_dict(table.state_dict())
    assert torch.equal(loaded.decode(), learned)


def test_training_that_is_cut_and_resumed_ends_the_same():
    whole, cut, resumed = (LowPrecision(num_bits=4).build(V, D) for _ in range(3))
    for table in (whole, cut, resumed):
        table.begin()
    train(whole, range(40))
    train(cut, range(20))
    resumed.load_state_dict(cut.state_dict())
    train(resumed, range(20, 40))
    assert torch.equal(whole.eval().decode(), resumed.eval().decode())


def test_without_begin_the_codes_stay_and_the_scales_learn():
    table = LowPrecision().build(V, D).fit(make_weight())
    table.sparse = True
    codes = table.packed_codes.clone()
    table(torch.tensor([4])).sum().backward()
    assert table.scales.grad.is_sparse
    table.maintain(0)
    assert torch.equal(table.packed_codes, codes)


@pytest.mark.parametrize("setting", [{"num_bits": 3}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_errors(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"LowPrecision has {name}={value}. Choose"):
        LowPrecision(**setting).build(V, D)
