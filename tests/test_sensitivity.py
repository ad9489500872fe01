"""Sensitivity against the formula, on models whose gradients are known."""

import pytest
import torch
from torch import nn

import leanrec
from leanrec import PQ, VRQ


class Linear(nn.Module):
    """The logit is a fixed direction times the row: g is that direction, whatever the row."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.direction = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(1)))
        self.dropout = nn.Dropout(0.5)

    def forward(self, *inputs):
        return self.dropout(self.table(*inputs)).reshape(len(inputs[0]), -1, 4).sum(1) @ self.direction


def make_embedding(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Embedding(20, 4, **settings)


def test_a_look_up_adds_p_times_one_minus_p_times_the_outer_product_of_the_gradient():
    model = Linear(make_embedding())
    ids = torch.tensor([3, 3, 5, 7])
    p = (model.table.weight[ids] @ model.direction).sigmoid().detach().double()
    g = model.direction.detach().double()
    found = leanrec.measure_sensitivity(model, [ids[:3], ids[3:]], counts={"table": torch.bincount(ids, minlength=20)})["table"]
    torch.testing.assert_close(found.metric, (p * (1 - p)).sum() * g.outer(g) / 4)
    mean = float((p * (1 - p)).mean() * g @ g)
    share = 4 / (4 + 17 * 0.1)  # a row that was not seen counts as a tenth of a look-up
    three = (float((p * (1 - p))[:2].sum() * g @ g) + 0.1 * mean) / 2.1 * 2 * share / 4
    assert float(found.rows[3]) == pytest.approx(three)
    assert float(found.rows[0]) == pytest.approx(mean * 0.1 * share / 4)


def test_it_foresees_the_rise_of_the_loss():
    model = Linear(make_embedding()).eval()
    ids = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(2))
    found = leanrec.measure_sensitivity(model, [ids])["table"]
    p = model(ids).sigmoid().detach()
    errors = 0.05 * torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    model.table.weight.data += errors
    cross_entropy = nn.functional.binary_cross_entropy
    rise = float(cross_entropy(model(ids).sigmoid().detach(), p) - cross_entropy(p, p))
    metric = (found.metric / found.metric.trace()).float()
    assert float((found.rows * ((errors @ metric) * errors).sum(1)).sum()) / 2 == pytest.approx(rise, rel=0.1)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_rows_of_a_bag_are_heard_one_by_one(mode):
    embedding = make_embedding()
    ids = torch.tensor([[1, 2, 2], [4, 5, 6]])
    bag = nn.EmbeddingBag(20, 4, mode=mode, _weight=embedding.weight.detach().clone())

    class Pooled(Linear):
        def forward(self, ids):
            rows = self.table(ids)
            return (rows.sum(1) if mode == "sum" else rows.mean(1)) @ self.direction

    one = leanrec.measure_sensitivity(Pooled(embedding), [ids])["table"]
    flat = leanrec.measure_sensitivity(Linear(bag), [(ids,)])["table"]
    torch.testing.assert_close(flat.rows, one.rows)
    torch.testing.assert_close(flat.metric, one.metric)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_model_may_change_in_place_what_it_looked_up(kind):
    class Scaled(Linear):
        def forward(self, ids):
            rows = self.table(ids.unsqueeze(1)).reshape(-1, 4)
            rows = rows.mul_(2) if self.in_place else rows * 2
            return rows.square() @ self.direction

    measured = []
    for in_place in (True, False):
        model = Scaled(kind(20, 4, _weight=make_embedding().weight.detach().clone()))
        model.in_place = in_place
        measured.append(leanrec.measure_sensitivity(model, [torch.arange(20)])["table"])
    torch.testing.assert_close(measured[0].rows, measured[1].rows)
    torch.testing.assert_close(measured[0].metric, measured[1].metric)


def test_padding_counts_for_nothing():
    found = leanrec.measure_sensitivity(Linear(make_embedding(padding_idx=0)), [torch.tensor([0, 0, 0, 3])])["table"]
    alone = leanrec.measure_sensitivity(Linear(make_embedding(padding_idx=0)), [torch.tensor([3])])["table"]
    torch.testing.assert_close(found.metric, alone.metric / 4)


def test_the_model_stays_as_it_was():
    model = Linear(make_embedding()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    leanrec.measure_sensitivity(model, [torch.arange(20)])
    assert model.training and model.dropout.training and not model.table._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compressed_tables_can_be_measured_too():
    model = Linear(make_embedding())
    plain = leanrec.measure_sensitivity(model, [torch.arange(20)])["table"]
    compressed = leanrec.compress(model, leanrec.Full())
    torch.testing.assert_close(leanrec.measure_sensitivity(compressed, [torch.arange(20)])["table"].rows, plain.rows)


def test_fit_and_budget_take_it_into_account():
    model = Linear(nn.Embedding(2000, 4))
    counts = {"table": torch.arange(2000, 0, -1)}
    found = leanrec.measure_sensitivity(model, [torch.arange(2000)], counts=counts)
    plan = leanrec.fit_budget(model, VRQ(), ratio=8, counts=counts, sensitivities=found)
    original = model.table.weight.detach().clone()
    leanrec.compress(model, plan, counts=counts, sensitivities=found)
    assert leanrec.report(model).ratio >= 8
    errors = model.table.decode().detach() - original
    along = errors @ (model.direction.detach() / model.direction.detach().norm())
    assert along.square().sum() < 0.01 * errors.square().sum()  # only this direction counts


def test_what_does_not_fit_is_an_error_of_one_line():
    model, ids = Linear(make_embedding()), torch.arange(20)
    found = leanrec.measure_sensitivity(model, [ids])
    with pytest.raises(ValueError, match="no table 'other'"):
        leanrec.compress(model, VRQ(), sensitivities={"other": found["table"]})
    with pytest.raises(ValueError, match="sensitivity is that of a table of 20 x 4"):
        leanrec.compress(Linear(nn.Embedding(21, 4)), PQ(), sensitivities=found)
    with pytest.raises(ValueError, match="looked up no rows"):
        leanrec.measure_sensitivity(model, [])
    with pytest.raises(ValueError, match="puts out a tuple"):
        leanrec.measure_sensitivity(nn.Sequential(nn.Embedding(5, 4), nn.GRU(4, 4)), [ids[:5]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_puts_out_what_is_not_finite_is_an_error_of_one_line(value):
    model = Linear(make_embedding())
    model.direction.data[0] = value
    with pytest.raises(ValueError, match=r"not finite \(nan or inf\).*Repair the model or the batches") as error:
        leanrec.measure_sensitivity(model, [torch.arange(20)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        torch.no_grad()(lambda model, rows: rows @ model.direction),
        torch.inference_mode()(lambda model, rows: rows @ model.direction),
        lambda model, rows: rows @ model.direction > 0,
        lambda model, rows: rows.detach() @ model.direction,
        lambda model, rows: torch.zeros(len(rows)),
    ],
)
def test_outputs_without_a_gradient_by_the_rows_are_an_error_of_one_line(answer):
    class Answering(Linear):
        def forward(self, ids):
            return answer(self, self.table(ids))

    with pytest.raises(ValueError, match=r"The model's outputs \(torch\.(bool|float32)\) have no gradient by the rows of its tables") as error:
        leanrec.measure_sensitivity(Answering(make_embedding()), [torch.arange(20)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_at_all_is_an_error(context):
    class Answering(Linear):
        def forward(self, ids):
            with context():
                return super().forward(ids)

    with pytest.raises(ValueError, match="have no gradient by the rows"):
        leanrec.measure_sensitivity(Answering(make_embedding()), [torch.arange(20)])


def test_finite_outputs_with_gradients_that_are_not_are_an_error():
    class Norm(Linear):
        def forward(self, ids):
            return self.table(ids).square().sum(1).sqrt()  # of a row of zeros: 0, with the gradient 0 x inf

    with pytest.raises(ValueError, match="not finite"):
        leanrec.measure_sensitivity(Norm(nn.Embedding(20, 4, _weight=torch.zeros(20, 4))), [torch.arange(20)])
