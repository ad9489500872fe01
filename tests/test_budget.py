import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from leanrec.budget import Option, Sizes, fit_budget, lower_hull, spend
from leanrec.compress import compress, tables
from leanrec.methods import METHODS, MGQE, CpRec, DropRare, LowRank, MixedPrecision, Scalar
from leanrec.methods.full import Full
from leanrec.methods.pq import PQ
from leanrec.methods.vrq import VRQ
from leanrec.report import report


def weight(num_embeddings, *, scale=1.0, seed=0):
    return scale * torch.randn(num_embeddings, 8, generator=torch.Generator().manual_seed(seed))


def model(**scales):
    """A table of 400 x 8 per name, its rows spread as its scale says."""
    return nn.ModuleDict({name: nn.Embedding.from_pretrained(weight(400, scale=scale), freeze=False) for name, scale in scales.items()})


FULL = 400 * 8 * 4
SIZES = {"user": 20_000, "hour": 26}


def random_options(rng, *, num_options):
    sizes = sorted(rng.sample(range(1, 60), num_options))
    losses = sorted((rng.uniform(0, 10) for _ in sizes), reverse=True)
    return [Option(None, nbytes, loss) for nbytes, loss in zip(sizes, losses, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_choice_is_near_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    options = [random_options(rng, num_options=rng.randint(1, 6)) for _ in range(4)]
    smallest, largest = (sum(pick(option.nbytes for option in choices) for choices in options) for pick in (min, max))
    budget = rng.randint(smallest, largest)
    picks = spend(options, budget)
    assert all(pick in choices for pick, choices in zip(picks, options, strict=True))
    assert sum(pick.nbytes for pick in picks) <= budget
    within = [combination for combination in itertools.product(*options) if sum(option.nbytes for option in combination) <= budget]
    best = min(sum(option.loss for option in combination) for combination in within)
    steps = [low.loss - high.loss for choices in options for low, high in itertools.pairwise(lower_hull(choices))]
    assert best <= sum(pick.loss for pick in picks) + 1e-9 <= best + max(steps, default=0) + 2e-9


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_where_the_budget_falls_on_a_step(seed):
    """Every total that a Lagrange multiplier leads to is optimal for its number of bytes (Everett, 1963)."""
    rng = random.Random(seed)
    options = [random_options(rng, num_options=5) for _ in range(3)]
    multiplier = rng.uniform(0, 1)
    relaxed = [min(choices, key=lambda option: option.loss + multiplier * option.nbytes) for choices in options]
    picks = spend(options, sum(option.nbytes for option in relaxed))
    assert sum(pick.loss for pick in picks) == pytest.approx(sum(option.loss for option in relaxed))


def test_whole_budget_buys_every_table_its_best():
    options = [[Option(None, 10, 5.0), Option(None, 20, 4.9), Option(None, 40, 0.0)], [Option(None, 5, 1.0), Option(None, 6, 0.5)]]
    assert [pick.loss for pick in spend(options, 46)] == [0.0, 0.5]


def test_left_over_bytes_are_spent_off_the_hull():
    options = [[Option(None, 10, 5.0), Option(None, 20, 4.9), Option(None, 40, 0.0)]]
    assert [pick.loss for pick in spend(options, 30)] == [4.9]


@pytest.mark.parametrize("ratio", [2, 5, 10, 16])
def test_compressed_tables_keep_the_budget(ratio):
    network = model(user=1.0, item=0.3)
    compress(network, fit_budget(network, PQ(), ratio=ratio))
    size = report(network)
    assert size.tables_full == 2 * FULL and size.ratio >= ratio
    assert size.tables > 0.7 * size.tables_full / ratio  # the budget is used, not merely kept


def test_bytes_and_ratio_say_the_same():
    assert fit_budget(model(user=1.0), PQ(), nbytes=FULL // 8) == fit_budget(model(user=1.0), PQ(), ratio=8)


def test_more_bytes_go_where_the_rows_spread_more():
    plan = fit_budget(model(narrow=0.05, wide=1.0), PQ(), ratio=10)
    assert plan["wide"].nbytes(400, 8) > 2 * plan["narrow"].nbytes(400, 8)


def test_a_constant_offset_of_the_rows_costs_nothing():
    network = model(shifted=0.05, wide=1.0)
    network["shifted"].weight.data += 100.0
    assert fit_budget(network, PQ(), ratio=10) == {
        "shifted": fit_budget(model(narrow=0.05, wide=1.0), PQ(), ratio=10)["narrow"],
        "wide": fit_budget(model(narrow=0.05, wide=1.0), PQ(), ratio=10)["wide"],
    }


def test_counts_weigh_the_spread():
    """Rows that are looked up lie close together in `user`, far apart in `item`; without counts the two tables are alike."""
    network = model(user=1.0, item=1.0)
    network["user"].weight.data[:200] *= 0.01
    network["item"].weight.data[:200] *= 0.01
    first, last = torch.ones(400, dtype=torch.int64), torch.ones(400, dtype=torch.int64)
    first[:200], last[200:] = 1000, 1000
    plan = fit_budget(network, PQ(), ratio=10, counts={"user": first, "item": last})
    assert plan["item"].nbytes(400, 8) > 2 * plan["user"].nbytes(400, 8)


def test_ample_budget_leaves_tables_alone():
    assert fit_budget(model(user=1.0, item=1.0), PQ(), ratio=1) == {"user": None, "item": None}


def test_table_left_alone_by_pattern_is_counted():
    plan = fit_budget(model(user=1.0, item=1.0), {"user": None, "*": PQ()}, ratio=1.7)
    assert plan["user"] is None
    assert FULL + plan["item"].nbytes(400, 8) <= 2 * FULL / 1.7


def test_shared_weight_is_paid_for_once():
    network = model(user=1.0, friend=1.0)
    network["friend"].weight = network["user"].weight
    plan = fit_budget(network, PQ(), ratio=8)
    assert plan["user"] == plan["friend"]
    assert report(compress(network, plan)).tables_full == FULL
    assert plan["user"].nbytes(400, 8) > 0.7 * FULL / 8


def test_compressed_table_may_stay_as_it_is():
    network = compress(model(user=1.0), PQ(num_subspaces=2, num_centroids=16))
    assert fit_budget(network, PQ(), ratio=FULL / network["user"].nbytes) == {"user": None}


def test_paths_with_glob_characters_stay_exact():
    network = nn.ModuleDict({"a[0]*": model(user=1.0)["user"], "a0b": model(user=1.0)["user"]})
    plan = fit_budget(network, PQ(), ratio=12)
    compress(network, plan)
    assert [module.method for module in tables(network).values()] == list(plan.values())


def test_nothing_is_built():
    class Unbuildable(PQ):
        def build(self, num_embeddings, embedding_dim, *, generator=None):
            raise AssertionError

    assert isinstance(fit_budget(model(user=1.0), Unbuildable(), ratio=8)["user"], Unbuildable)


def test_budget_that_cannot_be_met_says_what_can():
    network = model(user=1.0)
    with pytest.raises(ValueError, match=r"The budget of 10 bytes cannot be met.*with these 1 tables is (\d+) bytes, a ratio of [\d.]+\.") as error:
        fit_budget(network, PQ(), nbytes=10)
    smallest = int(str(error.value).split(" bytes, a ratio")[0].split()[-1])
    compress(network, fit_budget(network, PQ(), nbytes=smallest))
    assert network["user"].nbytes == smallest
    with pytest.raises(ValueError, match="cannot be met"):
        fit_budget(model(user=1.0), Full(), ratio=2)


@pytest.mark.parametrize("given", [{}, {"nbytes": 100, "ratio": 2.0}])
def test_one_of_bytes_and_ratio_is_needed(given):
    with pytest.raises(ValueError, match="Give one of nbytes and ratio"):
        fit_budget(model(user=1.0), PQ(), **given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", [LowRank(), PQ(), VRQ(), Scalar(), MixedPrecision()], ids=lambda method: method.short())
def test_a_budget_counts_bytes_in_the_precision_of_the_table(dtype, method):
    network = model(user=1.0).to(dtype)
    plan = fit_budget(network, method, ratio=3)
    assert type(plan["user"]) is type(method)
    compress(network, plan)
    full = report(model(user=1.0)).tables
    assert report(network).tables <= full / 3
    if isinstance(method, LowRank):
        assert report(network).tables > full / 3 - 400 * dtype.itemsize, "another coordinate a row would not fit"


def test_tables_that_cannot_be_compressed_are_refused():
    network = model(user=1.0)
    network["user"].weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"Table 'user' \(400 x 8\): it holds values that are not finite"):
        fit_budget(network, PQ(), ratio=2)
    with pytest.raises(ValueError, match=r"Table 'user' \(400 x 8\): it is on the meta device"):
        fit_budget(model(user=1.0).to("meta"), PQ(), ratio=2)


def test_numbers_of_numpy_are_numbers():
    network = model(user=1.0)
    assert fit_budget(network, PQ(), nbytes=np.int64(4000)) == fit_budget(network, PQ(), nbytes=4000)
    assert fit_budget(network, PQ(), ratio=np.float32(3)) == fit_budget(network, PQ(), ratio=3)


@pytest.mark.parametrize("nbytes", [float("nan"), float("inf"), "100"])
def test_bytes_must_be_a_number(nbytes):
    with pytest.raises(ValueError, match="must be a number of bytes"):
        fit_budget(model(user=1.0), PQ(), nbytes=nbytes)


@pytest.mark.parametrize("ratio", [0, -3, float("nan"), 1e-320, "50"])
def test_ratio_must_be_positive(ratio):
    with pytest.raises(ValueError, match="must be more than 0"):
        fit_budget(model(user=1.0), PQ(), ratio=ratio)


@pytest.mark.parametrize("rows", range(401, 421))
def test_the_ratio_of_the_smallest_tables_can_be_met(rows):
    sizes = Sizes(nn.Embedding(rows, 8), PQ())
    assert sizes.budget(ratio=sizes.full / sizes.least) == sizes.least
    for ratio in (1.5, 3, 4):
        most = sizes.budget(ratio=ratio)
        assert sizes.full / most >= ratio > sizes.full / (most + 1)


def test_pattern_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="No table matches the pattern 'usr'"):
        fit_budget(model(user=1.0), {"usr": PQ()}, ratio=2)


@pytest.mark.parametrize("method", [VRQ(), MGQE(), DropRare(), CpRec()], ids=repr)
def test_the_order_of_ids_that_are_not_sorted_by_popularity_is_stored_within_the_budget(method):
    counts = {"user": torch.arange(400, 0, -1), "item": torch.arange(400)}
    network = model(user=1.0, item=1.0)
    plan = fit_budget(network, method, ratio=6, counts=counts)
    assert plan["user"].sorted_rows and not plan["item"].sorted_rows
    assert report(compress(network, plan, counts=counts)).ratio >= 6
    assert fit_budget(model(item=1.0), replace(method, sorted_rows=False), ratio=6, counts={"item": counts["item"]}) == {
        "item": fit_budget(model(item=1.0), method, ratio=6, counts={"item": counts["item"]})["item"]
    }


@pytest.mark.parametrize("ratio", [10, 50, 100, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_placed_at_a_ratio_or_says_the_nearest_it_can_do(method, ratio):
    draws = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({name: nn.Embedding(size, 16, _weight=torch.randn(size, 16, generator=draws)) for name, size in SIZES.items()})
    counts = {name: (1_000_000 / (1 + torch.arange(size))).long() for name, size in SIZES.items()}
    full = sum(SIZES.values()) * 16 * 4
    try:
        plan = fit_budget(network, METHODS[method](), ratio=ratio, counts=counts)
    except ValueError as error:
        nearest = float(re.fullmatch(r".* a ratio of ([\d.]+)\.", str(error))[1])
        assert nearest < ratio
        if nearest < 1:
            return
        plan, ratio = fit_budget(network, METHODS[method](), ratio=nearest - 0.05, counts=counts), nearest - 0.05
    sizes = [SIZES[name] * 16 * 4 if chosen is None else chosen.nbytes(SIZES[name], 16) for name, chosen in plan.items()]
    assert sum(sizes) <= full / ratio
