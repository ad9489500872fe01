"""Every method keeps every promise of the contract. Nothing here knows a method by name, but for the gaps."""

import random
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from leanrec.methods import METHODS, parse
from leanrec.ops.spread import Spread

V, D = 1000, 16
SHAPES = [(1, 8), (2, 4), (10, 16), (37, 1), (129, 12)]

KNOWN_GAPS = {
    ("Scalar", "test_gradients_reach_every_parameter"): "codes and scales are frozen: it compresses trained tables and cannot be trained itself",
}
OTHER_FORMS = ["RQ(word_bits=8)"]  # settings with which a method stores other tensors


def promise(test):
    """Runs a test for every method, and expects it to fail where KNOWN_GAPS says so."""
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for (name, gap), reason in KNOWN_GAPS.items() if gap == test.__name__}
    methods = [(name, kind()) for name, kind in METHODS.items()] + [(text, parse(text)) for text in OTHER_FORMS]
    return pytest.mark.parametrize("method", [pytest.param(quick(method), id=name, marks=marks.get(name, [])) for name, method in methods])(test)


def quick(method):
    """The defaults, but for few steps where a fit learns by steps: no promise here is about the last percent."""
    return replace(method, **{field.name: 20 for field in fields(method) if field.name == "num_steps"})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings=V, embedding_dim=D):
    """Rows whose variance falls from column to column, mixed by a rotation, around a mean: as trained tables are."""
    draws = seeded(1)
    spread = 0.8 ** torch.arange(embedding_dim)
    rotation = torch.linalg.qr(torch.randn(embedding_dim, embedding_dim, generator=draws))[0]
    return (torch.randn(num_embeddings, embedding_dim, generator=draws) * spread) @ rotation + 0.1


def make_counts(num_embeddings=V):
    """Counts as of a click log: falling, and none for padding and unknown."""
    counts = (100_000 / (1 + torch.arange(num_embeddings)) ** 1.1).long()
    counts[:2] = 0
    return counts


@cache
def fitted(method):
    """A table fitted once; tests leave it as it is."""
    return method.build(V, D, generator=seeded(0)).fit(make_weight())


def relative_error(table, weight):
    rows = table.decode().float()
    return float((rows - weight).square().sum() / (weight - weight.mean(0)).square().sum())


def fitting(method, num_embeddings, embedding_dim):
    """Settings that fit a shape: all that a budget may choose from."""
    return method.variants(num_embeddings, embedding_dim)


@promise
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
def test_rows_have_the_shape_of_the_ids_and_one_dimension_more(method, shape):
    ids = torch.randint(V, shape, generator=seeded(2))
    rows = fitted(method)(ids)
    assert rows.shape == (*shape, D)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, fitted(method).decode()[ids])


@promise
def test_ids_of_32_bits_are_ids_too(method):
    ids = torch.tensor([3, 999, 0], dtype=torch.int32)
    assert torch.equal(fitted(method)(ids), fitted(method)(ids.long()))


@promise
def test_a_row_does_not_depend_on_its_batch(method):
    ids = torch.tensor([5, 999, 5, 0, 17])
    together = fitted(method)(ids)
    alone = torch.cat([fitted(method)(one) for one in ids.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # the order of a sum may differ with the size of a product


@promise
def test_rows_lie_on_the_axes_that_a_table_names(method):
    for table in (fitted(method), method.build(V, D)):
        if (axes := table.axes()) is not None:
            coordinates, basis, mean = axes
            assert coordinates.shape[1] + 1 < D
            torch.testing.assert_close(table.decode(), coordinates @ basis + mean, rtol=1e-5, atol=1e-6)


@promise
@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), SHAPES)
def test_stored_bytes_are_the_bytes_announced(method, num_embeddings, embedding_dim):
    for setting in fitting(method, num_embeddings, embedding_dim):
        table = setting.build(num_embeddings, embedding_dim)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in table.state_dict().values())
        assert stored == setting.nbytes(num_embeddings, embedding_dim) == table.nbytes, setting


@promise
def test_defaults_work_on_a_1000_x_16_table_and_fitting_keeps_the_bytes(method):
    defaults = type(method)()
    assert defaults.build(V, D).fit(make_weight(), make_counts()).nbytes == defaults.nbytes(V, D)


@promise
@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [*SHAPES, (V, D), (100_000, 32)])
def test_size_never_falls_with_the_knob(method, num_embeddings, embedding_dim):
    values = list(method.knob_values(num_embeddings, embedding_dim))
    sizes = [method.with_knob(value).nbytes(num_embeddings, embedding_dim) for value in values]
    assert values == sorted(set(values))
    assert sizes == sorted(sizes)


@promise
@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [*SHAPES, (V, D), (100_000, 32)])
def test_expected_error_is_a_share_that_never_rises_with_the_knob(method, num_embeddings, embedding_dim):
    values = method.knob_values(num_embeddings, embedding_dim)
    spread = Spread.measure([make_weight(num_embeddings, embedding_dim)], num_embeddings, make_counts(num_embeddings))
    errors = [method.with_knob(value).expected_error(spread) for value in values]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert all(0 <= setting.expected_error(spread) <= 1 for setting in fitting(method, num_embeddings, embedding_dim))


@promise
@pytest.mark.parametrize("counts", [None, make_counts()], ids=["alike", "counts"])
def test_expected_error_is_near_the_error_of_a_fit(method, counts):
    """Within a factor of three over all values of the knob, as far as the error means anything."""
    weight = make_weight()
    shares = torch.full((V,), 1 / V) if counts is None else counts / counts.sum()
    distances = (weight - shares @ weight).square().sum(1)
    spread = Spread.measure([weight], V, counts)
    for value in method.knob_values(V, D):
        setting = method.with_knob(value)
        found = float(
            shares @ (setting.build(V, D, generator=seeded(0)).fit(weight, counts).decode() - weight).square().sum(1) / (shares @ distances)
        )
        expected = setting.expected_error(spread)
        assert found / 3 - 0.01 <= expected <= 3 * found + 0.01, (value, found, expected)


@promise
def test_fitting_beats_the_mean_row(method):
    assert relative_error(fitted(method), make_weight()) < 0.9


@promise
def test_error_falls_as_the_knob_grows(method):
    values = method.knob_values(V, D)
    few = sorted({values[0], values[len(values) // 2], values[-1]})
    errors = [relative_error(method.with_knob(value).build(V, D).fit(make_weight()), make_weight()) for value in few]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(few)


@promise
@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), SHAPES)
def test_small_tables_fit_with_any_settings_and_hold_finite_rows(method, num_embeddings, embedding_dim):
    choices = fitting(method, num_embeddings, embedding_dim)
    weight, counts = make_weight(num_embeddings, embedding_dim), make_counts(num_embeddings)
    for setting in {choices[0], choices[-1]}:
        assert setting.build(num_embeddings, embedding_dim).fit(weight, counts).decode().isfinite().all()


@promise
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_constant_table_stays_constant(method, value):
    setting = fitting(method, 50, 8)[0]
    rows = setting.build(50, 8).fit(torch.full((50, 8), value)).decode()
    torch.testing.assert_close(rows, torch.full((50, 8), value), rtol=1e-3, atol=1e-6)  # 1e-3: a float16 scale


@promise
def test_same_seed_same_table_and_global_random_state_untouched(method):
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    tables = [method.build(V, D, generator=seeded(3)).fit(make_weight(), make_counts()) for _ in range(2)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), repr(np.random.get_state()))
    for one, other in zip(*(table.state_dict().values() for table in tables), strict=True):
        assert torch.equal(one, other)


@promise
def test_the_seed_of_a_table_comes_from_the_generator(method):
    assert method.build(V, D, generator=seeded(3)).seed != method.build(V, D, generator=seeded(4)).seed


@promise
def test_fitting_leaves_the_weight_as_it_is_and_keeps_no_part_of_it(method):
    weight = make_weight()
    table = method.build(V, D).fit(weight)
    rows = table.decode()
    assert torch.equal(weight, make_weight())
    weight.zero_()
    assert torch.equal(table.decode(), rows)


@promise
def test_a_weight_of_bfloat16_fits_as_well(method):
    weight = make_weight()
    error = relative_error(method.build(V, D).fit(weight.bfloat16()), weight)
    assert error <= relative_error(fitted(method), weight) * 1.1 + 1e-4  # 1e-4: bfloat16 itself loses 1e-5 of the variance


@promise
def test_gradients_reach_every_parameter(method):
    table = method.build(V, D, generator=seeded(0))
    mixture = torch.randn(V, D, generator=seeded(4))
    loss = (table(torch.arange(V)) * mixture).sum() + table.penalty()
    loss.backward()
    parameters = dict(table.named_parameters())
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@promise
def test_a_fitted_table_that_was_trained_on_answers_the_same_in_its_stored_form(method):
    table, ids = deepcopy(fitted(method)), torch.arange(1, V)
    shapes = {name: value.shape for name, value in table.state_dict().items()}
    table.begin_tuning()
    torch.testing.assert_close(table.eval()(ids), fitted(method)(ids), msg="it begins with what was fitted")
    parameters = [parameter for parameter in table.parameters() if parameter.requires_grad]
    if parameters:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (table.train()(ids) - make_weight()[ids.flip(0)]).square().sum().backward()
            optimizer.step()
    before = table.eval()(ids).detach()
    table.finish()
    torch.testing.assert_close(table(ids).detach(), before)
    assert {name: value.shape for name, value in table.state_dict().items()} == shapes and table.nbytes == method.nbytes(V, D)


@promise
def test_padding_row_is_zero_and_learns_nothing(method):
    table = deepcopy(fitted(method))
    rows_without = table.decode()
    table.padding_idx = 3
    assert table(torch.tensor([3])).abs().sum() == 0
    others = torch.arange(V) != 3
    assert torch.equal(table.decode()[others], rows_without[others])
    if any(parameter.requires_grad for parameter in table.parameters()):
        table(torch.tensor([3, 3])).sum().backward()
        assert all(not parameter.grad.any() for parameter in table.parameters())


@promise
def test_repr_reads_back(method):
    assert parse(repr(method)) == method
    for setting in fitting(method, V, D):
        assert parse(repr(setting)) == setting == parse(setting.short())


@promise
def test_settings_are_hashable_and_compare_by_value(method):
    assert {method, replace(method)} == {method}


@promise
def test_bad_knob_is_an_error_of_one_line_that_names_it(method):
    for action in (method.with_knob(-1).nbytes, method.with_knob(-1).build):
        with pytest.raises(ValueError, match=f"{method.knob}=-1") as error:
            action(V, D)
        assert "\n" not in str(error.value)


@promise
def test_a_saved_table_answers_the_same(method):
    saved = {name: tensor.clone() for name, tensor in fitted(method).state_dict().items()}
    fresh = method.build(V, D, generator=seeded(5))
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.decode(), fitted(method).decode())


@promise
def test_exported_program_agrees(method):
    table = fitted(method).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(table, (torch.arange(8),), dynamic_shapes=shapes).module()
    for size in (1, 8, 31):
        ids = torch.randint(V, (size,), generator=seeded(size))
        torch.testing.assert_close(exported(ids), table(ids), rtol=0, atol=1e-6)


@promise
def test_compiled_table_agrees_in_one_graph(method):
    torch.compiler.reset()  # what an earlier test compiled would count against the limit of recompilations
    table = fitted(method)
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    ids = torch.randint(V, (4, 5), generator=seeded(6))
    torch.testing.assert_close(compiled(ids), table(ids), rtol=0, atol=1e-6)


@promise
@pytest.mark.parametrize("wrong", [-1, V])
def test_an_id_outside_the_table_is_an_error(method, wrong):
    with pytest.raises(IndexError, match=f"id {wrong} is outside the table's rows 0 to {V - 1}"):
        fitted(method)(torch.tensor([0, wrong, 1]))


@promise
def test_ids_as_floats_are_an_error(method):
    with pytest.raises(ValueError, match=r"ids are torch\.float32"):
        fitted(method)(torch.tensor([1.0, 2.0]))


@promise
def test_a_change_of_precision_and_back_changes_nothing(method):
    table = deepcopy(fitted(method))
    torch.testing.assert_close(table.double().decode().float(), fitted(method).decode())
    torch.testing.assert_close(table.float().decode(), fitted(method).decode())
    assert table.nbytes == fitted(method).nbytes


@promise
def test_a_move_that_fails_changes_nothing(method):
    table = deepcopy(fitted(method))
    expected = table(torch.arange(50))

    def fail(tensor):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        table._apply(fail)
    torch.testing.assert_close(table(torch.arange(50)), expected)


@promise
def test_a_replica_answers_the_same(method):
    """As `nn.DataParallel` makes them: parameters and buffers are attributes of the copy."""
    table = fitted(method)
    replica = table._replicate_for_data_parallel()
    for name, tensor in [*table._parameters.items(), *table._buffers.items()]:
        replica._parameters.pop(name, None)
        replica._buffers.pop(name, None)
        object.__setattr__(replica, name, tensor)
    torch.testing.assert_close(replica(torch.arange(50)), table(torch.arange(50)))


@promise
def test_settings_are_plain_literals(method):
    wide = {field.name: np.int64(getattr(method, field.name)) for field in fields(method) if type(field.default) is int}
    wide |= {field.name: np.float64(getattr(method, field.name)) for field in fields(method) if type(field.default) is float}
    wide |= {field.name: list(getattr(method, field.name)) for field in fields(method) if type(field.default) is tuple}
    assert repr(replace(method, **wide)) == repr(method)
    for field in fields(method):
        kind = type(field.default)
        for wrong in [b"", None, [b""], float("inf"), *([2.5, True] if kind is int else [])]:
            with pytest.raises(ValueError, match=rf"^{type(method).__name__} has {field.name}=.*\. Give a plain {kind.__name__}, .*\.$"):
                replace(method, **{field.name: wrong})
        if field.name == "weight_power":
            with pytest.raises(ValueError, match=rf"{type(method).__name__} has weight_power=16.0. Choose 0 to 4."):
                replace(method, weight_power=16)


@promise
def test_bfloat16_agrees_within_its_precision(method):
    rows = deepcopy(fitted(method)).to(torch.bfloat16).decode()
    assert rows.dtype == torch.bfloat16
    spread = make_weight().std()
    torch.testing.assert_close(rows.float() / spread, fitted(method).decode() / spread, rtol=0.02, atol=0.03)  # 8 bits of mantissa, a few terms


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@promise
def test_gpu_agrees(method):
    on_gpu = method.build(V, D, generator=seeded(0)).fit(make_weight().cuda()).cuda()
    error = relative_error(fitted(method), make_weight())
    assert relative_error(on_gpu, make_weight().cuda()) <= error * 1.1 + 1e-6
    moved = deepcopy(fitted(method)).cuda()
    torch.testing.assert_close(moved.decode().cpu(), fitted(method).decode(), rtol=1e-4, atol=1e-4)


@promise
@pytest.mark.parametrize(
    ("make_wrong", "message"), [(lambda w: w[:-1], "999 x 16"), (lambda w: w.clone().index_fill_(0, torch.tensor([7]), torch.nan), "row 7")]
)
def test_a_weight_that_cannot_be_fitted_is_an_error(method, make_wrong, message):
    with pytest.raises(ValueError, match=message):
        method.build(V, D).fit(make_wrong(make_weight()))


def test_a_gap_names_a_method_and_a_promise_and_stands_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    for (name, gap), reason in KNOWN_GAPS.items():
        assert name in METHODS
        assert callable(globals()[gap])
        assert reason in page


def test_docs_describe_every_method_that_was_measured():
    root = Path(__file__).parents[1]
    measured = [name for name in METHODS if f"| `{name}` |" in (root / "benchmarks" / "METHODS.md").read_text()]
    page = (root / "docs" / "methods.md").read_text()
    assert len(measured) > 20
    assert [name for name in measured if f"| `{name}` |" not in page] == []
