"""What compression costs on held-out rows, against the same computed by hand, and what a budget makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import leanrec
from leanrec import PQ, VRQ
from leanrec.budget import Sizes
from leanrec.calibration import cost_factors
from leanrec.embeddings import table_groups

V, D, N = 400, 8, 20_000
METHOD = VRQ(codes_per_1000_rows=600, num_levels=2, num_centroids=16)


class Two(nn.Module):
    """The logit is the sum of a row of one table and of a bag of another, along fixed directions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.row, self.bag = nn.Embedding(V, D), nn.EmbeddingBag(V, D, mode="sum")
        for table in (self.row, self.bag):
            table.weight = nn.Parameter(torch.randn(V, D, generator=generator) * 0.5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids, lists):
        return self.dropout(self.row(ids).sum(1) + self.bag(lists).sum(1))


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (N,), generator=generator), torch.randint(V, (N, 2), generator=generator)


@pytest.fixture(scope="module")
def model():
    return Two()


@pytest.fixture(scope="module")
def found(model):
    return leanrec.measure_sensitivity(model, [draw(1)])


@torch.no_grad()
def clicks(model, inputs, *, without=None, seed=3):
    """Labels that the model would be right about, but that one table, which learned what is not so, adds nothing to."""
    model = copy.deepcopy(model).eval()
    if without is not None:
        model.get_submodule(without).weight.zero_()
    return torch.bernoulli(model(*inputs).sigmoid(), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("path", ["row", "bag"])
def test_a_factor_is_what_the_compressed_table_costs_alone_over_what_was_expected(model, found, path):
    inputs, expected = draw(2), 0.01
    labels = clicks(model, inputs)
    [factor] = cost_factors(
        model, table_groups(model), {path: METHOD}, {path: expected}, [(inputs, labels)], counts={}, sensitivities=found, seed=0
    ).values()
    table = leanrec.compress(copy.deepcopy(model.get_submodule(path)), METHOD, sensitivities={"": found[path]})
    alone = copy.deepcopy(model).eval()
    alone.set_submodule(path, table)
    rises = F.binary_cross_entropy_with_logits(alone(*inputs), labels, reduction="none") - F.binary_cross_entropy_with_logits(
        copy.deepcopy(model).eval()(*inputs), labels, reduction="none"
    )
    error = float(rises.std()) / N**0.5
    assert rises.mean() > 2 * error
    assert factor == pytest.approx((float(rises.mean()) + error) / (expected + error), rel=1e-3)


def test_a_table_that_learned_what_is_not_so_is_cheap(model, found):
    inputs = draw(2)
    methods, expected = {"row": METHOD, "bag": METHOD}, {"row": 0.01, "bag": 0.01}

    for useful, learned in (("row", "bag"), ("bag", "row")):
        labels = clicks(model, inputs, without=learned)
        batches = [(tuple(part[half] for part in inputs), labels[half]) for half in (slice(0, N // 2), slice(N // 2, N))]
        factors = cost_factors(model, table_groups(model), methods, expected, batches, counts={}, sensitivities=found, seed=0)
        assert factors[learned] < 0.25 * factors[useful]


@pytest.mark.parametrize(("useful", "learned", "ratio"), [("row", "bag", 16), ("row", "bag", 24), ("bag", "row", 20)])
def test_a_budget_goes_where_it_pays_on_held_out_rows(model, found, useful, learned, ratio):
    """At ratios at which rows shrink; where next to nothing is lost, it is chance whether what is left of a useless row is for or against."""
    inputs = draw(2)
    batches = [(inputs, clicks(model, inputs, without=learned))]
    before, after = (
        leanrec.fit_budget(model, VRQ(num_centroids=16), ratio=ratio, sensitivities=found, held_out=held_out) for held_out in (None, batches)
    )
    assert after[useful].nbytes(V, D) > before[useful].nbytes(V, D)
    assert after[learned].nbytes(V, D) < before[learned].nbytes(V, D)


def test_few_rows_change_little(model, found):
    inputs = draw(2)
    batches = [(tuple(part[:30] for part in inputs), clicks(model, inputs, without="row")[:30])]
    factors = cost_factors(model, table_groups(model), {"row": METHOD}, {"row": 1e-4}, batches, counts={}, sensitivities=found, seed=0)
    assert 0.8 < factors["row"] < 2.25
    one = [(tuple(part[:1] for part in inputs), torch.ones(1))]
    assert cost_factors(model, table_groups(model), {"row": METHOD}, {"row": 0.01}, one, counts={}, sensitivities=found, seed=0) == {"row": 1.0}


def test_the_model_stays_as_it_was(model, found):
    before = copy.deepcopy(model.state_dict())
    model.train()
    leanrec.fit_budget(model, VRQ(), ratio=10, sensitivities=found, held_out=[(draw(2), torch.ones(N))])
    assert model.training and model.dropout.training and not model.row._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_one_size_object_makes_plans_for_several_sizes(model, found):
    inputs = draw(2)
    sizes = Sizes(model, VRQ(num_centroids=16), sensitivities=found, held_out=[(inputs, clicks(model, inputs))])
    used = [sum(method.nbytes(V, D) for method in sizes.plan(ratio=ratio).values()) for ratio in (10, 20)]
    assert used[0] <= sizes.full / 10 and used[1] <= sizes.full / 20 and used[1] < used[0]


def test_methods_that_expect_no_log_loss_are_left_as_they_are(model, found):
    class Unread:
        def __iter__(self):
            raise AssertionError("nothing is to be compared with them")

    plans = [leanrec.fit_budget(model, PQ(), ratio=12, sensitivities=found, held_out=held_out) for held_out in (None, Unread())]
    assert plans[0] == plans[1]


def test_held_out_rows_need_sensitivities(model):
    with pytest.raises(ValueError, match="held_out goes with sensitivities"):
        leanrec.fit_budget(model, VRQ(), ratio=10, held_out=[(draw(2), torch.ones(N))])
